"""From whole spaces down to single plans, always into what has the least bound."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llmspec.compiler.search.candidates import (
    Candidate,
    Family,
    Floored,
    Outline,
    Sharing,
    Sketch,
    Turn,
    Way,
)
from llmspec.compiler.search.families import Point, may_be_of, near
from llmspec.compiler.search.objective import Objective, Weight
from llmspec.compiler.search.space import Space

EFFORT = {Sketch: 20, Outline: 20, Sharing: 1, Turn: 2, Way: 10, Floored: 1}
"""About how long it takes to open each, the first time."""


class Inner(NamedTuple):
    """A point inside another, with its bounds."""

    point: Point
    least_s: float
    least_bytes: float


@dataclass
class Inside:
    """What is inside each point; each is opened once."""

    known: dict[int, tuple[Space | Point, list[Inner]]] = field(default_factory=dict)

    def of(self, space: Space, point: Space | Point) -> list[Inner]:
        if id(point) not in self.known:
            self.known[id(point)] = point, list(_inside(space, point))
        return self.known[id(point)][1]


def _inside(space: Space, point: Space | Point) -> Iterator[Inner]:
    match point:
        case Space():
            for sketch in space.sketches():
                yield Inner(sketch, max(sketch.least_s, space.least_s), sketch.least_bytes)
        case Sketch():
            for outline in space.opened(point):
                yield Inner(outline, outline.least_s, outline.least_bytes)
        case Outline():
            yield from _of_outline(space, point)
        case Sharing():
            for interleave, schedules in space.ranges.ways(point.outline.grid.pipeline):
                for schedule in schedules:
                    for offload in space.offloads:
                        turn = space.bounds.turn(point, interleave, schedule, offload)
                        yield Inner(turn, turn.least_s, point.least_bytes)
        case Turn():
            yield from _of_turn(space, point)
        case Way():
            yield from _of_way(space, point)


def _of_outline(space: Space, outline: Outline) -> Iterator[Inner]:
    """First itself with the bound that takes longer, then the ways of its data ranks to share."""
    if not outline.sharp:
        sharp = space.bounds.sharpened(outline)
        yield Inner(sharp, sharp.least_s, sharp.least_bytes)
        return
    for zero, shards in space.ranges.shardings(outline.grid):
        sharing = space.bounds.sharing(outline, zero, shards)
        yield Inner(sharing, sharing.least_s, max(outline.least_bytes, sharing.least_bytes))


def _of_turn(space: Space, turn: Turn) -> Iterator[Inner]:
    """Its cuts."""
    sharing = turn.sharing
    how = (turn.interleave, turn.schedule, sharing.zero, sharing.shards, turn.offload)
    for way in space.ways(sharing.outline, *how):
        least_bytes = max(sharing.least_bytes, space.bounds.way_bytes(way))
        yield Inner(way, turn.least_s, least_bytes)


def _of_way(space: Space, way: Way) -> Iterator[Inner]:
    """Itself with its floor."""
    floor = space.floor(way)
    yield Inner(Floored(way, floor), floor.least_s, space.bounds.way_bytes(way))


def missing(space: Space, floored: Floored) -> float:
    """Bytes by which it is too large at the least; not positive where it may fit."""
    return space.misses(floored.way, floored.floor)


def priced(space: Space, floored: Floored) -> Candidate | None:
    """None where its floors say that it does not fit, or there is no such plan."""
    if missing(space, floored) > 0:
        return None
    if space.besides and space.host_lacks(floored.way, floored.floor):
        return None
    return space.priced(floored.way)


@dataclass
class Descent:
    """The ways of some spaces.

    by_bytes: the smallest first, of those with the fewest stages under the simplest schedule; else
    what is preferred first, and what no plan of it is small or fast enough for the budget is left
    out. of: only plans of one family; near: only such as differ little from this mesh. too_slow:
    how many plans were left out for that. effort: about in how long it takes to open a sharing.
    """

    objective: Objective
    inside: Inside
    by_bytes: bool = False
    of: Family | None = None
    near: Mapping[str, str] | None = None
    waiting: list[tuple[Weight, int, Space, Space | Point]] = field(default_factory=list)
    number: int = 0
    too_slow: int = 0
    effort: int = 0

    def start(self, spaces: Sequence[Space]) -> None:
        for space in spaces:
            if self.of is None or dict(space.choices).get(*self.of) == self.of[1]:
                weight = self.objective.weight(space.least_s, 0.0, space.ranks)
                self._wait(space, space, (0.0,) if self.by_bytes else weight)

    def ways(self, ended: Callable[[Weight], bool]) -> Iterator[tuple[Space, Floored]]:
        """Until none is left or the least bound of all is such that the search has ended."""
        while self.waiting and not ended(self.waiting[0][0]):
            least, place, space, point = heapq.heappop(self.waiting)
            self.effort += 1 if id(point) in self.inside.known else EFFORT.get(type(point), 1)
            if isinstance(point, Floored):
                size = (space.budget_bytes + missing(space, point),) if self.by_bytes else least
                if size > least:
                    self._wait(space, point, size, place)
                else:
                    yield space, point
                continue
            for inner in self.inside.of(space, point):
                if self._wanted(space, inner.point):
                    again = isinstance(inner.point, Outline) and isinstance(point, Outline)
                    self._push(space, inner, least, place if again else None)

    def nothing_under(self, weight: Weight) -> bool:
        """Whether no way that is left has a bound below."""
        return not self.waiting or self.waiting[0][0] >= weight

    def nothing_fits(self) -> bool:
        """Whether no way that is left can, by its bytes."""
        return not self.waiting or self.waiting[0][0][0] > self.waiting[0][2].budget_bytes

    def narrow(self) -> None:
        """To what has the least bound alone."""
        del self.waiting[1:]

    def pruned(self) -> int:
        """Plans that were left out by a bound. Those of a number of nodes that was not opened are
        not counted, nor what needs more memory than there is."""
        return self.too_slow + sum(_plans_in(space, point) for _, _, space, point in self.waiting)

    def _wanted(self, space: Space, point: Point) -> bool:
        if self.of is not None and self.of not in space.choices and not may_be_of(self.of, point):
            return False
        if self.of is not None and self.near is not None and isinstance(point, Sketch):
            return near(point, self.near, self.of)
        if not self.by_bytes or not isinstance(point, Turn):
            return True
        if self.of is not None and self.of[0] in ("schedule", "interleave"):
            return True
        interleave, schedules = space.ranges.ways(point.sharing.outline.grid.pipeline)[0]
        return (point.interleave, point.schedule) == (interleave, schedules[0])

    def _push(self, space: Space, inner: Inner, outer: Weight, place: int | None) -> None:
        if self.by_bytes:
            self._wait(space, inner.point, (max(*outer, inner.least_bytes),), place)
        elif inner.least_s > space.most_step_s:
            self.too_slow += _plans_in(space, inner.point)
        elif inner.least_bytes <= space.budget_bytes:
            weight = self.objective.weight(inner.least_s, inner.least_bytes, space.ranks)
            self._wait(space, inner.point, max(outer, weight), place)

    def _wait(
        self, space: Space, point: Space | Point, least: Weight, place: int | None = None
    ) -> None:
        """`place`: among its equals, that of before."""
        if place is None:
            self.number, place = self.number + 1, self.number
        heapq.heappush(self.waiting, (least, place, space, point))


def _plans_in(space: Space, point: Space | Point) -> int:
    match point:
        case Space():
            return 0
        case Turn() | Way() | Floored():
            return 1
        case _:
            return space.plans_in(point)
