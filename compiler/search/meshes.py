"""Which meshes a cluster and a spec's pins allow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd

from llmspec.compiler.cost.stage import Parts
from llmspec.compiler.plan import MeshSizes
from llmspec.compiler.search.pins import Pins


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Ranks along tensor, context and pipeline, and what is left for data; expert ranks are some of
    the data ranks."""

    tensor: int
    pipeline: int
    data: int
    context: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        """Expert ranks are some of the data ranks."""
        return self.tensor * self.pipeline * self.data * self.context

    def parts(self, zero: int, shards: int) -> Parts:
        """Into how many ZeRO cuts weights. Context ranks shard with each data rank; experts are cut
        over all ranks that hold the same, whatever the number of shards."""
        if zero == 0:
            return Parts()
        return Parts(shared=shards * self.context, experts=self.data * self.context // self.expert)

    def mesh(self, shards: int) -> MeshSizes:
        """With so many of the data ranks sharding."""
        return MeshSizes(
            pipeline=self.pipeline,
            replicas=self.data // shards,
            shards=shards,
            context=self.context,
            expert=self.expert,
            tensor=self.tensor,
        )


def grids(
    world: int,
    per_node: int,
    blocks: int,
    pins: Pins,
    *,
    contexts: Sequence[int] = (1,),
    experts: int = 1,
) -> Iterator[Grid]:
    """Tensor ranks stay inside a node; a pipeline has at most a block on each rank.

    contexts: the numbers of context ranks that can share a sequence. experts: what the number of
        expert ranks must divide.
    """
    pinned = pins.stage_blocks()
    for tensor in pins.allowed("tensor", divisors(per_node)):
        if world % tensor:
            continue
        for pipeline in pins.allowed("pipeline", divisors(world // tensor)):
            if pipeline > blocks:
                continue
            if pinned is not None and len(pinned) % pipeline:
                continue
            for context in pins.allowed("context", contexts):
                data, rest = divmod(world // tensor // pipeline, context)
                if rest or not pins.allows("data", data):
                    continue
                for expert in pins.allowed("expert", divisors(gcd(experts, data))):
                    yield Grid(
                        tensor=tensor,
                        pipeline=pipeline,
                        data=data,
                        context=context,
                        expert=expert,
                    )


def shardings(grid: Grid, pins: Pins, per_node: int) -> Iterator[tuple[int, int]]:
    """(zero, shards of the data ranks). ZeRO 0 is one shard; hybrid sharding has fewer shards than
    data ranks. Context ranks shard with each of them, and the key `shard` counts them."""
    if pins.allows("zero", 0) and pins.allows("shard", 1):
        yield 0, 1
    tried = divisors(grid.data) if pins.about("shard") else _worth_sharding(grid, per_node)
    for shards in tried:
        parts = shards * grid.context
        if parts == 1 or not pins.allows("shard", parts):
            continue
        for zero in pins.allowed("zero", (1, 2, 3)):
            yield zero, shards


def _worth_sharding(grid: Grid, per_node: int) -> list[int]:
    """The data ranks of a node, all data ranks, and a 16th, a 256th … of all nodes' between them.

    Fewer than a node's send as many bytes over its links, since what is not gathered is summed over
    more replicas, and hold more. Between a node's and all, the bytes over the network are nearly
    the same and only the ring's latency grows, with the nodes that it passes through."""
    near = gcd(grid.data, max(1, per_node // (grid.tensor * grid.context)))
    nodes = grid.data // near
    steps = [n for n in divisors(nodes) if _is_power_of_16(nodes // n)]
    return [near * n for n in sorted({1, *steps})]


def _is_power_of_16(ratio: int) -> bool:
    return ratio & (ratio - 1) == 0 and ratio.bit_length() % 4 == 1


def nearest_batches(batch: int, data: list[int]) -> list[int]:
    """The batches next to `batch`, below and above, that one of these numbers of data ranks
    divides."""
    below = max((batch // d * d for d in data if batch >= d), default=None)
    above = min((-(-batch // d) * d for d in data), default=None)
    return sorted({n for n in (below, above) if n})
