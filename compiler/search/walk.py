"""Branch and bound over the space of plans."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from llmspec.compiler.orders import Schedule
from llmspec.compiler.search.candidates import WORTH_OFFLOADING, Candidate, Outline, Sketch
from llmspec.compiler.search.explain import Family, Tally, families_with, possible_families
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

    heap: list[_Worst] = field(default_factory=list)

    def add(self, candidate: Candidate) -> None:
        entry = _Worst(candidate.rank, candidate)
        if len(self.heap) < SHORTLIST:
            heapq.heappush(self.heap, entry)
        elif self.heap[0] < entry:
            heapq.heapreplace(self.heap, entry)

    def candidates(self) -> list[Candidate]:
        return [entry.candidate for entry in sorted(self.heap, reverse=True)]

    def closed_to(self, least_s: float) -> bool:
        """Whether no plan with a step of at least `least_s` can enter."""
        return len(self.heap) == SHORTLIST and self.heap[0].candidate.weighed_s < least_s


@dataclass
class Walk:
    """Prices outlines, the most promising first, and leaves out those whose bound says that nothing
    in them could be the best of anything: of all plans, of a family, of the shortlist."""

    space: Space
    tally: Tally = field(default_factory=Tally)
    shortlist: Shortlist = field(default_factory=Shortlist)
    smallest: Candidate | None = None
    considered: int = 0
    fit: int = 0
    bound: bool = False
    """Whether only what beats the best plan so far is looked at."""

    def run(self) -> None:
        """Without offload first, unless the spec speaks of it."""
        self._walk()
        more = self.space.with_offload()
        if more is not None:
            self.space, self.bound = more, self.fit > 0
            self._walk()

    def _walk(self) -> None:
        waiting: list[tuple[float, int, Sketch | Outline]] = []
        too_large: list[Sketch] = []
        number = itertools.count()
        for sketch in self.space.sketches():
            heapq.heappush(waiting, (sketch.least_s, next(number), sketch))
        while waiting:
            least_s, _, item = heapq.heappop(waiting)
            if isinstance(item, Outline):
                self._price(item)
            elif item.least_bytes > self.space.budget_bytes:
                too_large.append(item)
            elif self.bound and self._beaten(least_s):
                return
            elif not self.shortlist.closed_to(least_s):
                for outline in self.space.opened(item):
                    heapq.heappush(waiting, (outline.least_s, next(number), outline))
        if not self.fit:
            for sketch in too_large:
                for outline in self.space.opened(sketch):
                    self._price(outline)

    def _price(self, outline: Outline) -> None:
        if outline.least_bytes > self.space.budget_bytes:
            if self.smallest is not None and self.tally.lowest(
                possible_families(outline, self.space), outline.least_bytes
            ):
                return
            for candidate in self.space.smallest_of(outline):
                self._add(candidate)
        elif not self._hopeless(outline):
            shared = possible_families(outline, self.space)
            shared = {f for f in shared if f[0] not in ("schedule", "interleave")}
            skip = self._too_large(outline)
            for interleave, schedules in self.space.ranges.ways(outline.grid.pipeline):
                left = [s for s in schedules if not self._lost(outline, shared, interleave, s)]
                for candidate in self.space.candidates_of(outline, interleave, left, skip):
                    self._add(candidate)

    def _lost(
        self, outline: Outline, shared: set[Family], interleave: int, schedule: Schedule
    ) -> bool:
        """Whether an outline's plans under one schedule can be the best of nothing."""
        if outline.grid.pipeline == 1:
            return False
        least_s = self.space.bounds.scheduled_s(outline, interleave, schedule)
        if not self.shortlist.closed_to(least_s):
            return False
        own = {("schedule", str(schedule)), ("interleave", str(interleave))}
        return self.tally.settled(shared | own, least_s)

    def _too_large(self, outline: Outline) -> Callable[[int, int], bool]:
        """Whether a way to shard cannot fit, and is the smallest of nothing."""

        def skip(zero: int, shards: int) -> bool:
            least = self.space.bounds.shared_bytes(outline, zero, shards)
            if least <= self.space.budget_bytes or self.smallest is None:
                return False
            return self.tally.lowest(families_with(outline, zero, shards, self.space), least)

        return skip

    def _hopeless(self, outline: Outline) -> bool:
        if self.bound and self._beaten(outline.least_s):
            return True
        if not self.shortlist.closed_to(outline.least_s):
            return False
        return self.tally.settled(possible_families(outline, self.space), outline.least_s)

    def _beaten(self, least_s: float) -> bool:
        """Whether offload cannot make a plan with such a bound the best of all."""
        best = min(entry.candidate.weighed_s for entry in self.shortlist.heap)
        return least_s * WORTH_OFFLOADING >= best

    def _add(self, candidate: Candidate) -> None:
        self.considered += 1
        self.tally.add(candidate)
        if candidate.times is not None:
            self.fit += 1
            self.shortlist.add(candidate)
        elif self.smallest is None or candidate.peak_bytes < self.smallest.peak_bytes:
            self.smallest = candidate


def fastest(space: Space) -> Candidate | None:
    """The best plan that fits, by the closed form; None when none does. Offload where nothing else
    fits."""
    more = space.with_offload()
    return _fastest(space) or (_fastest(more) if more is not None else None)


def _fastest(space: Space) -> Candidate | None:
    best: Candidate | None = None
    for outline in space.outlines():
        if outline.least_bytes > space.budget_bytes:
            continue
        if best is not None and outline.least_s > best.weighed_s:
            break
        for candidate in space.candidates(outline):
            if candidate.times is not None and (best is None or candidate.rank < best.rank):
                best = candidate
    return best
