"""What the data axes cost a stage: gathers and reductions of ZeRO 0-3, less what computing
hides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from llmspec.compiler.cost.hardware import UNIT, Machine
from llmspec.compiler.cost.network import Group, collective_s, exposed_s
from llmspec.compiler.cost.stage import Run, Stage
from llmspec.compiler.cost.types import Types
from llmspec.compiler.placement import Collective

BUCKET_BYTES = 25 * 2**20
"""Of ZeRO 0's reduction: the last one has nothing to hide behind."""

GATHER, SCATTER, REDUCE = Collective.ALL_GATHER, Collective.REDUCE_SCATTER, Collective.ALL_REDUCE


ALONE = Group(ranks=1, inside=1, bandwidth=math.inf, latency_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataGroups:
    """experts: the ranks with the same experts, for weights that expert ranks have split."""

    shards: Group
    replicas: Group
    data: Group
    experts: Group = ALONE


@dataclass(frozen=True, slots=True, kw_only=True)
class DataCost:
    """Exposed seconds: in each micro-batch's forward and backward, and once a step at its start and
    end. host_*: of the link to host memory. weights_*: of each micro-batch's computing, what casts
    weights and adds up their gradients.

    sends: (kind, axis, bytes, how often in a step).
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0
    host_forward_s: float = 0.0
    host_backward_s: float = 0.0
    weights_forward_s: float = 0.0
    weights_backward_s: float = 0.0
    sends: tuple[tuple[str, str, int, int], ...] = ()


NOTHING = DataCost()


def added(costs: Sequence[DataCost]) -> DataCost:
    """Of several stages of one rank."""
    if len(costs) == 1:
        return costs[0]
    names = [f.name for f in fields(DataCost) if f.name != "sends"]
    sends = tuple(send for cost in costs for send in cost.sends)
    return DataCost(sends=sends, **{n: sum(getattr(c, n) for c in costs) for n in names})


@dataclass(frozen=True, slots=True)
class ZeroUnit:
    """One block of ZeRO's units: elements, of them those of split experts, which are a unit inside
    it, seconds of its forward and backward, how often. stays: gathered from its forward to its
    backward, as the root is. late: elements whose gradients a split backward leaves to its second
    part; of experts there are none."""

    elements: int
    experts: int
    forward_s: float
    backward_s: float
    count: int
    stays: bool = False
    late: int = 0


def units_of(stage: Stage) -> list[ZeroUnit]:
    units = [_unit(run) for run in stage.runs if run.repeated and run.cost.elements]
    if stage.root_elements:
        rest = [_unit(run) for run in stage.runs if not run.repeated]
        forward, backward = sum(u.forward_s for u in rest), sum(u.backward_s for u in rest)
        late = max(0, stage.root_elements - stage.root_early_elements)
        experts = stage.root_expert_elements
        units.append(
            ZeroUnit(stage.root_elements, experts, forward, backward, 1, stays=True, late=late)
        )
    return units


def _unit(run: Run) -> ZeroUnit:
    cost = run.cost
    forward = cost.whole_forward_s
    backward = cost.whole_backward_s + run.again_s
    return ZeroUnit(
        cost.elements, cost.expert_elements, forward, backward, run.count, late=cost.late_elements
    )


def sent_s(kind: Collective, width: int, unit: ZeroUnit, groups: DataGroups) -> float:
    """Both parts of a unit, one after the other: they use the same links."""
    shared = collective_s(kind, width * (unit.elements - unit.experts), groups.shards)
    return shared + collective_s(kind, width * unit.experts, groups.experts)


def data_cost(
    stage: Stage, zero: int, microbatches: int, groups: DataGroups, types: Types, machine: Machine
) -> DataCost:
    if not stage.elements:
        return NOTHING
    alone = groups.data.ranks == 1
    if alone:
        sent = NOTHING
    elif zero == 0:
        sent = _replicated(stage, groups, types, machine)
    else:
        sent = _sharded(units_of(stage), zero, microbatches, groups, types, machine)
    forward, backward = _cast_and_added(0 if alone else zero, microbatches, types, machine)
    elements = stage.elements / machine.memory_bytes_per_s
    return replace(
        sent, weights_forward_s=forward * elements, weights_backward_s=backward * elements
    )


def _cast_and_added(
    zero: int, microbatches: int, types: Types, machine: Machine
) -> tuple[float, float]:
    """Bytes an element that each micro-batch moves forward and backward beside the products: with
    ZeRO 0 each use casts, its gradient is cast back and added to the sum; with ZeRO 1 it is added
    in the reduced type; with ZeRO 2 and 3 it is copied into what is reduced."""
    if machine.gradient_bytes is not None:
        return 0.0, machine.gradient_bytes
    later = (microbatches - 1) / microbatches
    if zero == 0:
        cast = types.weights + types.compute if types.mixed else 0
        return float(cast), cast + later * 3 * types.gradients
    return 0.0, types.compute + types.reduced + (later * types.reduced if zero == 1 else 0.0)


def _replicated(stage: Stage, groups: DataGroups, types: Types, machine: Machine) -> DataCost:
    of_experts = types.reduced * stage.expert_elements
    size = types.reduced * stage.elements - of_experts
    tail = min(size, BUCKET_BYTES)
    buckets = -(-size // BUCKET_BYTES)
    latency = 2 * (buckets - 1) * groups.data.latency_s
    body = collective_s(REDUCE, size - tail, groups.data) + latency
    body += collective_s(REDUCE, of_experts, groups.experts)
    hidden = exposed_s(body, stage.backward_s, machine.overlap)
    last = hidden + collective_s(REDUCE, tail, groups.data)
    sends = [(str(REDUCE), "data", size, 1)]
    if of_experts and groups.experts.ranks > 1:
        sends.append((str(REDUCE), "expert_data", of_experts, 1))
    return DataCost(last_s=last, sends=tuple(sends))


def _sharded(
    units: list[ZeroUnit],
    zero: int,
    microbatches: int,
    groups: DataGroups,
    types: Types,
    machine: Machine,
) -> DataCost:
    share = machine.overlap
    gather = [sent_s(GATHER, types.compute, u, groups) for u in units]
    summed = REDUCE if machine.whole_sums and zero == 1 else SCATTER
    scatter = [sent_s(summed, types.reduced, u, groups) for u in units]
    pairs = list(zip(units, gather, scatter, strict=True))
    opening = max(gather)  # nothing runs before the first parameters are there
    closing = max(scatter)
    ahead = machine.gather_overlap
    gathering = opening + sum(u.count * exposed_s(g, u.forward_s, ahead) for u, g, _ in pairs)
    scattering = closing + sum(u.count * exposed_s(s, u.backward_s, share) for u, _, s in pairs)
    both = closing + sum(
        u.count * exposed_s((0.0 if u.stays else g) + s, u.backward_s, share) for u, g, s in pairs
    )
    gathering += copied_s(units, types.compute, machine, forward=True)
    copied = copied_s(units, types.reduced, machine, forward=False)
    scattering, both = scattering + copied, both + copied
    of_experts = sum(u.count * u.experts for u in units)
    size = sum(u.count * u.elements for u in units) - of_experts
    spare = sum(u.count * max(0.0, u.backward_s - s) for u, _, s in pairs)
    part = types.reduced * -(-size // groups.shards.ranks)
    across = exposed_s(collective_s(REDUCE, part, groups.replicas), spare, share)
    sends = tuple(_sends(units, zero, microbatches, groups, types, summed))
    match zero:
        case 1:
            return DataCost(first_s=gathering, last_s=scattering + across, sends=sends)
        case 2:
            return DataCost(first_s=gathering, backward_s=scattering, last_s=across, sends=sends)
        case _:
            return DataCost(forward_s=gathering, backward_s=both, last_s=across, sends=sends)


def copied_s(units: list[ZeroUnit], width: int, machine: Machine, *, forward: bool) -> float:
    """Of all units out of the buffer of their gather, or into that of their reduction: read and
    written once."""
    total = 0.0
    for unit in units:
        bare_s = 2 * width * unit.elements / machine.memory_bytes_per_s
        total += unit.count * machine.besides_s(UNIT, bare_s, forward=forward)
    return total


def _sends(
    units: list[ZeroUnit],
    zero: int,
    microbatches: int,
    groups: DataGroups,
    types: Types,
    summed: Collective,
) -> Iterator[tuple[str, str, int, int]]:
    """Of every unit by itself; experts are units inside their block."""
    for unit in units:
        gathers = (1 if unit.stays else 2) * microbatches if zero == 3 else 1
        for axis, where, elements in _shared(unit, groups):
            if where.ranks > 1 and elements:
                yield str(GATHER), axis, types.compute * elements, unit.count * gathers
    scatters = 1 if zero == 1 else microbatches
    for kind, axis, size, count in sums_of(units, groups, types, summed):
        yield kind, axis, size, count * (1 if axis == "replicas" else scatters)


def sums_of(
    units: list[ZeroUnit],
    groups: DataGroups,
    types: Types,
    summed: Collective = SCATTER,
    *,
    late: bool = False,
) -> Iterator[tuple[str, str, int, int]]:
    """(kind, axis, bytes, how often) of what sums all gradients of a backward once. late: those
    alone that a second part makes."""
    for unit in units:
        own = replace(unit, elements=unit.late, experts=0) if late else unit
        for axis, where, elements in _shared(own, groups):
            if where.ranks > 1 and elements:
                yield str(summed), axis, types.reduced * elements, unit.count
        shared = own.elements - own.experts
        if groups.replicas.ranks > 1 and shared:
            part = types.reduced * -(-shared // groups.shards.ranks)
            yield str(REDUCE), "replicas", part, unit.count


def _shared(unit: ZeroUnit, groups: DataGroups) -> tuple[tuple[str, Group, int], ...]:
    """(axis, ranks, elements) of its weights and of its experts."""
    return (
        ("shards", groups.shards, unit.elements - unit.experts),
        ("expert_data", groups.experts, unit.experts),
    )


BUCKETS = 6
"""Into how many runtime/replicated_data_parallel.py cuts gradients, if they are not too large."""


def buckets(sizes: Sequence[tuple[int, bool]]) -> list[list[int]]:
    """Gradients that ZeRO 0 sums together, by their places. `sizes`: bytes of the weights in the
    model's order, and whether they are experts', which have sums of their own."""
    enough = min(sum(size for size, _ in sizes) / BUCKETS, BUCKET_BYTES)
    found: list[list[int]] = []
    pending: dict[bool, list[int]] = {}
    for place, (_, kind) in reversed(list(enumerate(sizes))):
        pending.setdefault(kind, []).append(place)
        if sum(sizes[i][0] for i in pending[kind]) >= enough:
            found.append(pending.pop(kind))
    return [*found, *pending.values()]
