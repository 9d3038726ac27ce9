"""Which meshes a cluster and a spec's pins allow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llmspec.compiler.search.pins import Pins


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Ranks along tensor and pipeline, and what is left for data."""

    tensor: int
    pipeline: int
    data: int


def grids(world: int, per_node: int, blocks: int, pins: Pins) -> Iterator[Grid]:
    """Tensor ranks stay inside a node; a pipeline has at most a block on each rank."""
    pinned = pins.stage_blocks()
    for tensor in pins.allowed("tensor", divisors(per_node)):
        if world % tensor:
            continue
        for pipeline in pins.allowed("pipeline", divisors(world // tensor)):
            data = world // tensor // pipeline
            if pipeline > blocks or not pins.allows("data", data):
                continue
            if pinned is not None and len(pinned) != pipeline:
                continue
            yield Grid(tensor=tensor, pipeline=pipeline, data=data)


def shardings(data: int, pins: Pins) -> Iterator[tuple[int, int]]:
    """(zero, shards). ZeRO 0 is one shard; hybrid sharding has fewer shards than data ranks."""
    if pins.allows("zero", 0) and pins.allows("shard", 1):
        yield 0, 1
    for shards in pins.allowed("shard", divisors(data)):
        if shards == 1:
            continue
        for zero in pins.allowed("zero", (1, 2, 3)):
            yield zero, shards


def nearest_batches(batch: int, data: list[int]) -> list[int]:
    """The batches next to `batch`, below and above, that one of these numbers of data ranks
    divides."""
    below = max((batch // d * d for d in data if batch >= d), default=None)
    above = min((-(-batch // d) * d for d in data), default=None)
    return sorted({n for n in (below, above) if n})
