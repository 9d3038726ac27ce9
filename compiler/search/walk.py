"""Branch and bound over the space of plans, whatever is preferred of them."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from llmspec.compiler.search.candidates import Candidate
from llmspec.compiler.search.descent import Descent, Inside, priced
from llmspec.compiler.search.families import families_of
from llmspec.compiler.search.members import Members, Tally, peak_bytes
from llmspec.compiler.search.objective import Objective, Weight
from llmspec.compiler.search.space import Space

SHORTLIST = 12
"""Plans that are played after the closed form has ranked them."""


@dataclass(frozen=True, slots=True)
class _Worst:
    """Orders a heap so that the worst plan stands first."""

    rank: tuple[object, ...]
    candidate: Candidate

    def __lt__(self, other: _Worst) -> bool:
        return self.rank > other.rank  # type: ignore[operator]


@dataclass
class Shortlist:
    """The best plans by the closed form."""

    objective: Objective
    most: int = SHORTLIST
    heap: list[_Worst] = field(default_factory=list)
    best: Weight | None = None
    worst: Weight | None = None
    """Of its plans; the worst once it is full."""

    def add(self, candidate: Candidate) -> None:
        entry = _Worst(self.objective.rank(candidate), candidate)
        weight = self.objective.of(candidate)
        self.best = weight if self.best is None else min(self.best, weight)
        if len(self.heap) < self.most:
            heapq.heappush(self.heap, entry)
        elif self.heap[0] < entry:
            heapq.heapreplace(self.heap, entry)
        if len(self.heap) == self.most:
            self.worst = self.objective.of(self.heap[0].candidate)

    def candidates(self) -> list[Candidate]:
        return [entry.candidate for entry in sorted(self.heap, reverse=True)]

    def closed_to(self, least: Weight) -> bool:
        """Whether no plan with a weight of at least `least` can enter."""
        return self.worst is not None and self.worst < least


@dataclass
class Walk:
    """Prices plans, the most promising first, until no other can enter the shortlist.

    spaces: one for each number of nodes, and for each way to decide what the train block leaves
        open. considered: plans that were priced or found too large by their floor; pruned: that
        were left out by a bound; fit: of those priced. smallest: of all plans, where none fits.
    """

    spaces: Sequence[Space]
    objective: Objective
    most: int = SHORTLIST
    smallest: Candidate | None = None
    considered: int = 0
    fit: int = 0
    pruned: int = 0

    def __post_init__(self) -> None:
        self.tally = Tally(self.objective)
        self.shortlist = Shortlist(self.objective, self.most)
        self.inside = Inside()
        self.besides = tuple(s for of in self.spaces if (s := of.with_offload()) is not None)

    def run(self) -> None:
        """Without offload first, unless the spec speaks of it."""
        plain = self._walk(self.spaces, self.shortlist.closed_to)
        self.tally.settle(plain)
        self.plain_fits = self.fit > 0
        besides = self._walk(
            self.besides, self._beaten if self.plain_fits else self.shortlist.closed_to
        )
        if not self.plain_fits:
            self.tally.settle(besides)
        if not self.fit:
            self._weigh((*self.spaces, *self.besides))

    def look_around(self) -> None:
        """For the best of each family of plans beside the best of all."""
        mesh = dict(families_of(self.shortlist.candidates()[0]))
        members = Members(
            self.tally, self.inside, self.spaces, self.besides, mesh, none_fits=not self.plain_fits
        )
        members.look()
        self.considered += members.considered

    def _walk(self, spaces: Sequence[Space], closed: Callable[[Weight], bool]) -> Descent:
        descent = Descent(self.objective, self.inside)
        descent.start(spaces)
        for space, floored in descent.ways(closed):
            self.considered += 1
            found = priced(space, floored)
            if found is not None and space.in_time(found):
                self.fit += 1
                self.tally.add(found)
                self.shortlist.add(found)
        self.pruned += descent.pruned()
        return descent

    def _beaten(self, least: Weight) -> bool:
        """Whether offload cannot make a plan with such a bound the best of all."""
        best, (*first, step_s) = self.shortlist.best, least
        return best is not None and (*first, step_s * self.objective.worth_offloading) >= best

    def _weigh(self, spaces: Sequence[Space]) -> None:
        """The smallest plan first, until nothing smaller can come."""
        descent = Descent(self.objective, self.inside, by_bytes=True)
        descent.start(spaces)

        def ended(least: Weight) -> bool:
            return self.smallest is not None and self.smallest.peak_bytes <= least[0]

        for space, floored in descent.ways(ended):
            self.considered += 1
            found = space.priced(floored.way)
            if found is not None and found.times is None:
                known = self.smallest
                self.smallest = found if known is None else min(known, found, key=peak_bytes)


def best(spaces: Iterable[Space], objective: Objective) -> Candidate | None:
    """The best plan that fits, by the closed form; None when none does."""
    walk = Walk(tuple(spaces), objective, most=1)
    walk.run()
    return next(iter(walk.shortlist.candidates()), None)
