"""What cannot fit, kept aside while a search goes on: in the end the smallest of each family of
which nothing fits is found, and the smallest plan of all where nothing does."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from llmspec.compiler.search.candidates import (
    Candidate,
    Family,
    Outline,
    Sharing,
    Sketch,
    Way,
)
from llmspec.compiler.search.explain import (
    Tally,
    families_with,
    plain_families,
    shape_families,
)
from llmspec.compiler.search.space import Space

Item = Sketch | Outline | Sharing | Way


@dataclass
class Aside:
    """By the least bytes that each may have."""

    heap: list[tuple[float, int, Space, Item]] = field(default_factory=list)
    number: Iterator[int] = field(default_factory=itertools.count)

    def put(self, space: Space, item: Item, least_bytes: float) -> None:
        heapq.heappush(self.heap, (least_bytes, next(self.number), space, item))

    def weigh(
        self, tally: Tally, smallest: Candidate | None, add: Callable[[Space, Candidate], None]
    ) -> None:
        """The smallest first. Where something fits, all families that are spoken of have been met
        as its meshes were opened."""
        while self.heap:
            size, _, space, item = heapq.heappop(self.heap)
            if not tally.best and smallest is not None and smallest.peak_bytes <= size:
                return
            if isinstance(item, Sketch):
                if not tally.best:
                    for outline in space.opened(item):
                        self.put(space, outline, max(size, outline.least_bytes))
            elif tally.lowest(_families(space, item), size):
                continue
            elif isinstance(item, Way):
                found = space.priced(item)
                if found is not None:
                    add(space, found)
                    if smallest is None or found.peak_bytes < smallest.peak_bytes:
                        smallest = found
            else:
                for inner, least_bytes in _inside(space, item):
                    self.put(space, inner, max(size, least_bytes))


def _families(space: Space, item: Outline | Sharing | Way) -> set[Family]:
    match item:
        case Outline():
            ways = space.ranges.shardings(item.grid)
            return set().union(*(families_with(item, *way, space) for way in ways))
        case Sharing():
            families = families_with(item.outline, item.zero, item.shards, space)
            return families | set(shape_families(item.outline))
        case _:
            return plain_families(item) | set(space.choices)


def _inside(space: Space, item: Outline | Sharing) -> Iterator[tuple[Sharing | Way, float]]:
    """Of a sharing, the plans with the fewest stages under the simplest schedule."""
    if isinstance(item, Outline):
        for zero, shards in space.ranges.shardings(item.grid):
            sharing = space.bounds.sharing(item, zero, shards)
            yield sharing, sharing.least_bytes
        return
    outline = item.outline
    for interleave, schedules in space.ranges.ways(outline.grid.pipeline)[:1]:
        for offload in space.offloads:
            how = (interleave, schedules[0], item.zero, item.shards, offload)
            for way in space.ways(outline, *how):
                yield way, space.budget_bytes + space.misses(way, space.floor(way))
