"""Branch and bound over the space of plans, whatever is preferred of them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from llmspec.compiler.orders import Schedule
from llmspec.compiler.search.candidates import Candidate, Outline, Shape, Sketch
from llmspec.compiler.search.explain import (
    Family,
    Tally,
    families_with,
    plain_families,
    possible_families,
)
from llmspec.compiler.search.objective import Objective, Weight
from llmspec.compiler.search.pins import Recompute
from llmspec.compiler.search.space import Space

SHORTLIST = 12
"""Plans that are played after the closed form has ranked them."""

Item = Space | Sketch | Outline


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

    def add(self, candidate: Candidate) -> None:
        entry = _Worst(self.objective.rank(candidate), candidate)
        if len(self.heap) < self.most:
            heapq.heappush(self.heap, entry)
        elif self.heap[0] < entry:
            heapq.heapreplace(self.heap, entry)

    def candidates(self) -> list[Candidate]:
        return [entry.candidate for entry in sorted(self.heap, reverse=True)]

    @property
    def full(self) -> bool:
        return len(self.heap) == self.most

    def closed_to(self, least: Weight) -> bool:
        """Whether no plan with a weight of at least `least` can enter."""
        return self.full and self.objective.of(self.heap[0].candidate) < least


@dataclass
class Walk:
    """Prices outlines, the most promising first, and leaves out those whose bound says that nothing
    in them could be the best of anything: of all plans, of a family, of the shortlist.

    spaces: one for each number of nodes. explained: whether the best of each family is looked for,
        and what is smallest where nothing fits.
    """

    spaces: tuple[Space, ...]
    objective: Objective
    most: int = SHORTLIST
    explained: bool = True
    smallest: Candidate | None = None
    considered: int = 0
    fit: int = 0
    bound: bool = False
    """Whether only what beats the best plan so far is looked at."""

    def __post_init__(self) -> None:
        self.tally = Tally(self.objective)
        self.shortlist = Shortlist(self.objective, self.most)
        self.number = itertools.count()

    def run(self) -> None:
        """Without offload first, unless the spec speaks of it."""
        self._walk(self.spaces)
        more = tuple(s for of in self.spaces if (s := of.with_offload()) is not None)
        if more:
            self.bound = self.fit > 0
            self._walk(more)

    def _walk(self, spaces: Iterable[Space]) -> None:
        waiting: list[tuple[Weight, int, Space, Item]] = []
        too_large: list[tuple[Space, Sketch]] = []
        for space in spaces:
            self._push(waiting, space, space, space.least_s, 0.0)
        while waiting:
            least, place, space, item = heapq.heappop(waiting)
            if isinstance(item, Outline):
                if not item.sharp and self._may_matter(space, item):
                    sharp = space.bounds.sharpened(item)
                    self._push(waiting, space, sharp, sharp.least_s, sharp.least_bytes, place)
                else:
                    self._price(space, item)
            elif isinstance(item, Sketch) and item.least_bytes > space.budget_bytes:
                too_large.append((space, item))
            elif self.bound and self._beaten(least):
                return
            elif not (self.shortlist.closed_to(least) and self._settled(set(space.choices), least)):
                for inner in space.sketches() if isinstance(item, Space) else space.opened(item):
                    least_s = max(inner.least_s, space.least_s)
                    self._push(waiting, space, inner, least_s, inner.least_bytes)
        if self.explained and not self.fit:
            for space, sketch in too_large:
                for outline in space.opened(sketch):
                    self._price(space, outline)

    def _push(
        self,
        waiting: list[tuple[Weight, int, Space, Item]],
        space: Space,
        item: Item,
        least_s: float,
        least_bytes: float,
        place: int | None = None,
    ) -> None:
        """Not what is too slow for the deadline. `place`: among its equals, that of before."""
        if least_s <= space.most_step_s:
            least = self.objective.weight(least_s, least_bytes, space.ranks)
            number = next(self.number) if place is None else place
            heapq.heappush(waiting, (least, number, space, item))

    def _may_matter(self, space: Space, outline: Outline) -> bool:
        fits = outline.least_bytes <= space.budget_bytes
        return fits and not self._hopeless(space, outline)

    def _price(self, space: Space, outline: Outline) -> None:
        if outline.least_bytes > space.budget_bytes:
            self._price_too_large(space, outline)
        elif not self._hopeless(space, outline):
            shared = possible_families(outline, space)
            shared = {f for f in shared if f[0] not in ("schedule", "interleave")}
            skip, lost = self._too_large(space, outline), self._too_slow(space, outline)
            for interleave, schedules in space.ranges.ways(outline.grid.pipeline):
                left = [
                    s for s in schedules if not self._lost(space, outline, shared, interleave, s)
                ]
                for candidate in space.candidates_of(outline, interleave, left, skip, lost):
                    self._add(space, candidate)

    def _price_too_large(self, space: Space, outline: Outline) -> None:
        if not self.explained:
            return
        families = possible_families(outline, space)
        if self.smallest is None or not self.tally.lowest(families, outline.least_bytes):
            for candidate in space.smallest_of(outline):
                self._add(space, candidate)

    def _lost(
        self,
        space: Space,
        outline: Outline,
        shared: set[Family],
        interleave: int,
        schedule: Schedule,
    ) -> bool:
        """Whether an outline's plans under one schedule can be the best of nothing."""
        if outline.grid.pipeline == 1:
            return False
        least_s = space.bounds.scheduled_s(outline, interleave, schedule)
        least = self.objective.weight(least_s, outline.least_bytes, space.ranks)
        if not self.shortlist.closed_to(least):
            return False
        own = {("schedule", str(schedule)), ("interleave", str(interleave))}
        return self._settled(shared | own, least)

    def _too_large(self, space: Space, outline: Outline) -> Callable[[int, int], bool]:
        """Whether a way to shard is the best and the smallest of nothing."""

        def skip(zero: int, shards: int) -> bool:
            least = space.bounds.shared_bytes(outline, zero, shards)
            if least <= space.budget_bytes:
                return self._too_much(space, outline, zero, shards, least)
            if not self.explained:
                return True
            families = families_with(outline, zero, shards, space)
            return self.smallest is not None and self.tally.lowest(families, least)

        return skip

    def _too_much(
        self, space: Space, outline: Outline, zero: int, shards: int, least_bytes: float
    ) -> bool:
        """Whether a way to shard that may fit is the best of nothing, where memory decides."""
        if not self.objective.smaller_is_better:
            return False
        least = self.objective.weight(outline.least_s, least_bytes, space.ranks)
        if not self.shortlist.closed_to(least):
            return False
        return self._settled(families_with(outline, zero, shards, space), least)

    def _too_slow(
        self, space: Space, outline: Outline
    ) -> Callable[[Shape, int, int, Schedule], bool]:
        """Whether a plan, computing nothing again and with nothing in host memory, would be the
        best of nothing even so. Only asked where finding out what to compute again takes longer."""

        def lost(shape: Shape, zero: int, shards: int, schedule: Schedule) -> bool:
            if not self.bound and shape.recompute is not Recompute.SELECTIVE:
                return False
            if not self.bound and not self.shortlist.full:
                return False
            least_s = space.least_of(shape, zero, shards, schedule)
            least = self.objective.weight(least_s, outline.least_bytes, space.ranks)
            families = plain_families(shape, zero, shards, schedule) | set(space.choices)
            if self.bound:
                families |= {("offload", word) for o in space.offloads for word in o}
                worth_s = least_s * self.objective.worth_offloading
                worth = self.objective.weight(worth_s, outline.least_bytes, space.ranks)
                return self._beaten(least) and self._met(families, worth)
            return self.shortlist.closed_to(least) and self._met(families, least)

        return lost

    def _met(self, families: set[Family], least: Weight) -> bool:
        return not self.explained or self.tally.met(families, least)

    def _hopeless(self, space: Space, outline: Outline) -> bool:
        least = self.objective.weight(outline.least_s, outline.least_bytes, space.ranks)
        if self.bound and self._beaten(least):
            return True
        if not self.shortlist.closed_to(least):
            return False
        return self._settled(possible_families(outline, space), least)

    def _settled(self, families: set[Family], least: Weight) -> bool:
        return not self.explained or self.tally.settled(families, least)

    def _beaten(self, least: Weight) -> bool:
        """Whether offload cannot make a plan with such a bound the best of all."""
        best = min(self.objective.of(entry.candidate) for entry in self.shortlist.heap)
        *first, step_s = least
        return (*first, step_s * self.objective.worth_offloading) >= best

    def _add(self, space: Space, candidate: Candidate) -> None:
        self.considered += 1
        if candidate.times is not None and not space.in_time(candidate):
            return
        self.tally.add(candidate)
        if candidate.times is not None:
            self.fit += 1
            self.shortlist.add(candidate)
        elif self.smallest is None or candidate.peak_bytes < self.smallest.peak_bytes:
            self.smallest = candidate


def best(spaces: Iterable[Space], objective: Objective) -> Candidate | None:
    """The best plan that fits, by the closed form; None when none does. Nothing is looked for
    beside it."""
    walk = Walk(tuple(spaces), objective, most=1, explained=False)
    walk.run()
    return next(iter(walk.shortlist.candidates()), None)
