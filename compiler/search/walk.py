"""Branch and bound over the space of plans, whatever is preferred of them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from llmspec.compiler.cost.offload import Offload
from llmspec.compiler.search.aside import Aside
from llmspec.compiler.search.aside import Item as Large
from llmspec.compiler.search.candidates import Candidate, Floor, Outline, Sharing, Sketch, Turn, Way
from llmspec.compiler.search.explain import (
    Family,
    Tally,
    families_with,
    plain_families,
    possible_families,
    shape_families,
    turn_families,
)
from llmspec.compiler.search.objective import Objective, Weight
from llmspec.compiler.search.space import Space

SHORTLIST = 12
"""Plans that are played after the closed form has ranked them."""


@dataclass(frozen=True, slots=True)
class Floored:
    """A way with what no plan of it undercuts."""

    way: Way
    floor: Floor


Item = Space | Sketch | Outline | Sharing | Turn | Floored


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
    pruned: int = 0
    """Plans that were left out by a bound of theirs, without a price."""
    bound: bool = False
    """Whether only what beats the best plan so far is looked at."""

    def __post_init__(self) -> None:
        self.tally = Tally(self.objective)
        self.shortlist = Shortlist(self.objective, self.most)
        self.number = itertools.count()
        self.waiting: list[tuple[Weight, int, Space, Item]] = []
        self.aside = Aside()

    def run(self) -> None:
        """Without offload first, unless the spec speaks of it."""
        self._walk(self.spaces)
        more = tuple(s for of in self.spaces if (s := of.with_offload()) is not None)
        if more:
            if not self.fit:  # what is missing without host memory
                self._weigh()
            self.bound = self.fit > 0
            self._walk(more)
        self._weigh()

    def _weigh(self) -> None:
        self.aside.weigh(self.tally, self.smallest, self._small)

    def _walk(self, spaces: Iterable[Space]) -> None:
        self.waiting = []
        for space in spaces:
            self._push(space, space, space.least_s, 0.0)
        self._drain()

    def _drain(self) -> None:
        while self.waiting:
            least, place, space, item = heapq.heappop(self.waiting)
            match item:
                case Floored():
                    self._price(space, item.way, item.floor, least)
                case Turn():
                    self._open_turn(space, item, least)
                case Sharing():
                    self._open_sharing(space, item)
                case Outline():
                    self._open_outline(space, item, place)
                case Sketch() if item.least_bytes > space.budget_bytes:
                    self._set_aside(space, item, item.least_bytes)
                case _ if self._closed(space, least):
                    self._prune(space, item)
                case _:
                    inside = space.sketches() if isinstance(item, Space) else space.opened(item)
                    for inner in inside:
                        least_s = max(inner.least_s, space.least_s)
                        self._push(space, inner, least_s, inner.least_bytes)

    def _push(
        self,
        space: Space,
        item: Item,
        least_s: float,
        least_bytes: float,
        place: int | None = None,
    ) -> None:
        """Not what is too slow for the deadline. `place`: among its equals, that of before."""
        if least_s > space.most_step_s:
            self._prune(space, item)
        else:
            least = self.objective.weight(least_s, least_bytes, space.ranks)
            number = next(self.number) if place is None else place
            heapq.heappush(self.waiting, (least, number, space, item))

    def _prune(self, space: Space, item: Item) -> None:
        """The plans in it are left out. Those of a number of nodes that was not opened are not
        counted."""
        match item:
            case Turn() | Floored():
                self.pruned += 1
            case Sketch() | Outline() | Sharing():
                self.pruned += space.plans_in(item)

    def _closed(self, space: Space, least: Weight) -> bool:
        """Whether no mesh with such a bound has to be opened."""
        if self.bound and self._beaten(least):
            return True
        return self.shortlist.closed_to(least) and self._settled(set(space.choices), least)

    def _open_outline(self, space: Space, outline: Outline, place: int) -> None:
        """Into the ways of its data ranks to share; first with the bound that takes longer."""
        if outline.least_bytes > space.budget_bytes:
            self._set_aside(space, outline, outline.least_bytes)
        elif self._hopeless(space, outline):
            self._prune(space, outline)
        elif not outline.sharp:
            sharp = space.bounds.sharpened(outline)
            self._push(space, sharp, sharp.least_s, sharp.least_bytes, place)
        else:
            for zero, shards in space.ranges.shardings(outline.grid):
                sharing = space.bounds.sharing(outline, zero, shards)
                if sharing.least_bytes > space.budget_bytes:
                    self._set_aside(space, sharing, sharing.least_bytes)
                else:
                    self._push(space, sharing, sharing.least_s, outline.least_bytes)

    def _set_aside(self, space: Space, item: Large, least_bytes: float) -> None:
        if self.explained:
            self.aside.put(space, item, least_bytes)

    def _leave_out(self, space: Space, sharing: Sharing) -> bool:
        """Whether a way to share is the best of nothing."""
        outline = sharing.outline
        families = families_with(outline, sharing.zero, sharing.shards, space)
        families |= set(shape_families(outline))
        # where memory decides, more is known of it than of the outline
        sized = self.objective.smaller_is_better
        least_bytes = sharing.least_bytes if sized else outline.least_bytes
        least = self.objective.weight(sharing.least_s, least_bytes, space.ranks)
        if self.bound and not self._beaten(least):
            return False
        if self.bound:
            return self._worthless(families, space.offloads, least)
        return self.shortlist.closed_to(least) and self._met(families, least)

    def _open_sharing(self, space: Space, sharing: Sharing) -> None:
        """Into schedules, and uses of host memory."""
        if self._leave_out(space, sharing):
            self._prune(space, sharing)
            return
        for interleave, schedules in space.ranges.ways(sharing.outline.grid.pipeline):
            for schedule in schedules:
                for offload in space.offloads:
                    turn = space.bounds.turn(sharing, interleave, schedule, offload)
                    self._push(space, turn, turn.least_s, sharing.outline.least_bytes)

    def _open_turn(self, space: Space, turn: Turn, least: Weight) -> None:
        """Into its cuts."""
        sharing = turn.sharing
        outline, sharded = sharing.outline, (sharing.zero, sharing.shards)
        families = turn_families(turn) | set(space.choices)
        if self._too_slow(families, turn.offload, least):
            self.pruned += 1
            return
        for way in space.ways(outline, turn.interleave, turn.schedule, *sharded, turn.offload):
            floor = space.floor(way)
            least_s = max(turn.least_s, floor.least_s)
            self._push(space, Floored(way, floor), least_s, outline.least_bytes)

    def _price(self, space: Space, way: Way, floor: Floor, least: Weight) -> None:
        """A plan, unless it is the best of nothing whatever it computes again, or does not fit and
        is the smallest of nothing."""
        families = plain_families(way) | set(space.choices)
        if self._too_slow(families, way.offload, least):
            self.pruned += 1
            return
        missing = space.misses(way, floor)
        if missing > 0:
            self._too_large(space, way, families, missing)
            return
        lacking = space.besides and space.host_lacks(way, floor)
        found = None if lacking else space.priced(way)
        if found is not None:
            self._add(space, found)
        elif way.offload:  # the host has no memory for it, or less there is enough
            self.tally.too_large.update(("offload", word) for word in way.offload)

    def _too_large(self, space: Space, way: Way, families: set[Family], missing: float) -> None:
        self.considered += 1
        self.tally.too_large.update(families)
        self._set_aside(space, way, space.budget_bytes + missing)

    def _too_slow(self, families: set[Family], offload: Offload, least: Weight) -> bool:
        """Whether a plan of these families is the best of nothing."""
        if self.bound:
            return self._beaten(least) and self._worthless(families, (offload,), least)
        return self.shortlist.closed_to(least) and self._met(families, least)

    def _worthless(self, families: set[Family], offloads: Iterable[Offload], least: Weight) -> bool:
        """Whether plans that use host memory, none of which is the best of all, are the best of
        nothing."""
        worth = self._worth(least)
        return self._settled(families, worth) and self._met(uses_of(offloads), worth)

    def _worth(self, least: Weight) -> Weight:
        """Of a plan that uses host memory."""
        *first, step_s = least
        return (*first, step_s * self.objective.worth_offloading)

    def _hopeless(self, space: Space, outline: Outline) -> bool:
        least = self.objective.weight(outline.least_s, outline.least_bytes, space.ranks)
        if self.bound and self._beaten(least):
            return True
        if not self.shortlist.closed_to(least):
            return False
        return self._settled(possible_families(outline, space), least)

    def _met(self, families: set[Family], least: Weight) -> bool:
        return not self.explained or self.tally.met(families, least)

    def _settled(self, families: set[Family], least: Weight) -> bool:
        return not self.explained or self.tally.settled(families, least)

    def _beaten(self, least: Weight) -> bool:
        """Whether offload cannot make a plan with such a bound the best of all."""
        best = self.shortlist.best
        return best is not None and self._worth(least) >= best

    def _add(self, space: Space, candidate: Candidate) -> None:
        self.considered += 1
        if candidate.times is None:
            self._small(space, candidate)
        elif space.in_time(candidate):
            self.tally.add(candidate)
            self.fit += 1
            self.shortlist.add(candidate)

    def _small(self, space: Space, candidate: Candidate) -> None:
        self.tally.add(candidate)
        if self.smallest is None or candidate.peak_bytes < self.smallest.peak_bytes:
            self.smallest = candidate


def uses_of(offloads: Iterable[Offload]) -> set[Family]:
    """The families of what may be in host memory."""
    return {("offload", word) for offload in offloads for word in offload}


def best(spaces: Iterable[Space], objective: Objective) -> Candidate | None:
    """The best plan that fits, by the closed form; None when none does. Nothing is looked for
    beside it."""
    walk = Walk(tuple(spaces), objective, most=1, explained=False)
    walk.run()
    return next(iter(walk.shortlist.candidates()), None)
