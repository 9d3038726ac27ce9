"""Every collective and message of one rank's step: kind, axis, ranks, bytes, how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import fx

from llmspec.compiler.cost.data import buckets, sums_of, units_of
from llmspec.compiler.cost.stage import Stage
from llmspec.compiler.cost.unit import parameter_nodes, resolve
from llmspec.compiler.graph import Unit
from llmspec.compiler.ops.registry import numel, shape_of
from llmspec.compiler.ops.routing import expert_counts
from llmspec.compiler.orders import order, rank_of, stages_of
from llmspec.compiler.placement import Collective, local_shape
from llmspec.compiler.search.candidates import Candidate
from llmspec.compiler.search.space import Space

Key = tuple[str, str, int, int]
"""(kind, axis, ranks, bytes of the whole value; of an all-to-all and a message what is given)."""

NORM_BYTES = 8
"""The square of the gradients' norm, in float64."""

COUNT_BYTES, WORST_BYTES = 8, 16
"""Of one expert's tokens, and of the worst load and share dropped (runtime/balance.py)."""


def collectives_of(
    space: Space, found: Candidate, stages: list[Stage], rank: int
) -> list[dict[str, Any]]:
    """Of any of the devices of a pipeline rank."""
    mesh = found.mesh
    own = stages_of(found.schedule, rank, len(stages), mesh.pipeline)
    counted: Counter[Key] = Counter()
    for stage in own:
        _in_blocks(counted, found, stages[stage])
        _between_data_ranks(counted, space, found, stages, stage)
        _partial(counted, space, found, stages[stage])
    if mesh.pipeline > 1:
        _between_stages(counted, space, found, stages, own)
    _loads(counted, space, found, own)
    if mesh.world_size > 1:
        counted[str(Collective.ALL_REDUCE), "world", mesh.world_size, NORM_BYTES] += 1
    return [
        {"kind": kind, "axis": axis, "ranks": ranks, "bytes": size, "count": often}
        for (kind, axis, ranks, size), often in sorted(counted.items())
    ]


def _in_blocks(counted: Counter[Key], found: Candidate, stage: Stage) -> None:
    """What operators and conversions of placement send, in each micro-batch."""
    mesh, count = found.mesh, found.shape.microbatches
    for run in stage.runs:
        for axis, kind, size, forward, backward in run.cost.sends:
            often = run.count * count * (forward + backward)
            counted[_key(kind, axis, getattr(mesh, axis), size)] += often
        for axis, kind, size, times in run.recompute.sends if run.recompute else ():
            key = _key(kind, axis, getattr(mesh, axis), size)
            counted[key] += run.count * count * times


def _key(kind: str, axis: str, ranks: int, size: int) -> Key:
    """`size`: of an all-to-all what all ranks hold together."""
    return kind, axis, ranks, size // ranks if kind == Collective.ALL_TO_ALL else size


def _partial(counted: Counter[Key], space: Space, found: Candidate, stage: Stage) -> None:
    """Gradients that are sums over the tensor ranks, together once a step."""
    parts = found.shape.grid.parts(found.zero, found.shards)
    summed = parts.largest(stage.shadow_elements, stage.expert_shadow_elements)
    if found.mesh.tensor > 1 and summed:
        size = space.types.reduced * summed
        counted[str(Collective.ALL_REDUCE), "tensor", found.mesh.tensor, size] += 1


def _between_data_ranks(
    counted: Counter[Key], space: Space, found: Candidate, stages: list[Stage], stage: int
) -> None:
    mesh, shape = found.mesh, found.shape
    sizes = {
        "shards": mesh.shards * mesh.context,
        "replicas": mesh.replicas,
        "data": mesh.data * mesh.context,
        "expert_data": mesh.expert_data,
    }
    if found.zero == 0:
        for axis, size in _bucket_bytes(space, found, stage):
            if sizes[axis] > 1:
                counted[str(Collective.ALL_REDUCE), axis, sizes[axis], size] += 1
        return
    cost = space.pricing.data_costs(shape, stages, found.zero, found.shards, found.offload)[stage]
    sends = list(cost.sends)
    if found.schedule.splits and found.zero > 1:
        sends = [one for one in sends if one[0] == str(Collective.ALL_GATHER)]
        sends += _sums_in_parts(space, found, stages, stage)
    for kind, axis, size, often in sends:
        counted[kind, axis, sizes[axis], size] += often


def _sums_in_parts(
    space: Space, found: Candidate, stages: list[Stage], stage: int
) -> Iterator[tuple[str, str, int, int]]:
    """ZeRO 2 and 3, backwards in two parts: what the first part makes is summed with what the next
    second part makes, over the replicas each time. A second part that follows another finds none
    of it."""
    ranks = found.mesh.pipeline
    lists = order(found.schedule, len(stages), ranks, found.shape.microbatches)
    own = lists[rank_of(found.schedule, stage, ranks)]
    kinds = [action.kind for action in own if action.stage == stage and action.kind != "F"]
    late = sum(pair == ("W", "W") for pair in pairwise(kinds))
    whole = found.shape.microbatches - late
    units, groups = units_of(stages[stage]), space.pricing.groups(found.mesh)
    for only_late, times in ((False, whole), (True, late)):
        for kind, axis, size, often in sums_of(units, groups, space.types, late=only_late):
            yield kind, axis, size, often * times


def _bucket_bytes(space: Space, found: Candidate, stage: int) -> Iterator[tuple[str, int]]:
    """(axis, bytes) of each of a stage's buckets."""
    shape = found.shape
    if found.mesh.data * found.mesh.context == 1:
        return
    option, graph = shape.option, space.graph(shape.microbatch, shape.option.view)
    own: list[tuple[int, bool]] = []
    first, stop = shape.cut[stage]
    for instance in graph.instances[first:stop]:
        unit = graph.units[instance.unit]
        states = resolve(unit, option.placements[unit.name], option.ranks).parameters
        for node in sorted(parameter_nodes(unit), key=_first_use):
            path = str(node.target)
            parameter = unit.parameters[path]
            if parameter.tied is None or found.mesh.pipeline > 1:
                local = numel(local_shape(shape_of(node), states[path], option.ranks))
                own.append((local, parameter.expert_ranks > 1))
    if found.mesh.expert_data == 1:
        own = [(size, split) for size, split in own if not split]
    stored = space.types.weights
    for bucket in buckets([(stored * size, split) for size, split in own]):
        axis = "expert_data" if own[bucket[0]][1] else "data"
        yield axis, space.types.reduced * sum(own[i][0] for i in bucket)


def _loads(counted: Counter[Key], space: Space, found: Candidate, own: tuple[int, ...]) -> None:
    """Once a step: how many tokens each expert got, and of all pipeline ranks the worst."""
    mesh, graph = found.mesh, space.graph(1)
    counts = {name: _counted(unit) for name, unit in graph.units.items()}
    here = [i for stage in own for i in graph.instances[slice(*found.shape.cut[stage])]]
    size = COUNT_BYTES * sum(counts[instance.unit] for instance in here)
    data = mesh.data * mesh.context
    if size and data > 1:
        counted[str(Collective.ALL_REDUCE), "data", data, size] += 1
    if any(counts.values()) and mesh.pipeline > 1:
        counted[str(Collective.ALL_REDUCE), "pipeline", mesh.pipeline, WORST_BYTES] += 1


def _counted(unit: Unit) -> int:
    """Numbers that its routers add up for their experts."""
    tables = [n.args[1] for n in unit.calls() if n.target is expert_counts]
    return sum(numel(shape_of(table)) for table in tables if isinstance(table, fx.Node))


def _first_use(node: fx.Node) -> int:
    """The order in which an emitted module holds its weights."""
    place = {other: i for i, other in enumerate(node.graph.nodes)}
    return min((place[user] for user in node.users), default=len(place))


def _between_stages(
    counted: Counter[Key],
    space: Space,
    found: Candidate,
    stages: list[Stage],
    own: tuple[int, ...],
) -> None:
    mesh, shape = found.mesh, found.shape
    message = max(s.output_bytes for s in stages[:-1])
    others = set(range(len(stages))) - set(own)
    ends = sum((s + 1 in others) + (s - 1 in others) for s in own)
    if ends:
        counted["send", "pipeline", mesh.pipeline, message] += ends * shape.microbatches
    parts = shape.grid.parts(found.zero, found.shards)
    shared, _ = space.pricing.shared_weights(stages, mesh, parts.shared, found.schedule)
    if shared and {0, len(stages) - 1} & set(own):
        counted["send", "pipeline", mesh.pipeline, shared] += 1
