"""Seconds of a collective over the ranks of one mesh axis, by latency and bandwidth."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.placement import Collective
from llmspec.compiler.plan import MeshSizes

ORDER = ("pipeline", "replicas", "shards", "context", "tensor")
"""Axes in rank order, outer to inner."""


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks of one axis as the wires see them: `inside` of them share a node.

    bandwidth: bytes/s one way that each rank gets; latency_s: of one whole round, by a ring or,
    for sums, a tree; ring_s: of a ring. paces: by kind of collective, how many rounds it takes and
    the share of the bandwidth it reaches, where that was measured.
    """

    ranks: int
    inside: int
    bandwidth: float
    latency_s: float
    ring_s: float = 0.0
    paces: tuple[tuple[str, float, float], ...] = ()

    def pace(self, kind: Collective) -> tuple[float, float]:
        return next(((r, share) for k, r, share in self.paces if k == kind), (1.0, 1.0))

    @property
    def crosses_nodes(self) -> bool:
        return self.inside < self.ranks


def group(ranks: int, stride: int, machine: Machine) -> Group:
    """`ranks` that stand `stride` apart in rank order.

    A ring over several nodes enters and leaves each node once; its neighbours in a node use all of
    that node's network devices between them, so that the slower of link and `inside` × network
    counts."""
    return _spread(ranks, min(ranks, max(1, machine.devices_per_node // stride)), machine)


def _spread(ranks: int, inside: int, machine: Machine) -> Group:
    if inside == ranks:
        hops = ranks - 1
        latency = machine.link_latency_s * hops
        paces = machine.collectives
        return Group(ranks, inside, machine.link_bytes_per_s, latency, latency, paces)
    network = machine.network_bytes_per_s * machine.ring_share
    bandwidth = network if inside == 1 else min(machine.link_bytes_per_s, network * inside)
    nodes = -(-ranks // inside)
    # NCCL leaves the ring for a tree where latency would rule.
    rounds = min(nodes - 1, 2 * math.ceil(math.log2(nodes)))
    latency = machine.link_latency_s * (inside - 1) + machine.network_latency_s * rounds
    # gathers and scatters have a ring only, which passes through each rank of each node
    ring = nodes * (inside - 1) * machine.link_latency_s + (nodes - 1) * machine.network_latency_s
    return Group(ranks, inside, bandwidth, latency, ring)


def axis_group(axis: str, mesh: MeshSizes, machine: Machine) -> Group:
    stride = math.prod(getattr(mesh, a) for a in ORDER[ORDER.index(axis) + 1 :])
    return group(getattr(mesh, axis), stride, machine)


def data_group(mesh: MeshSizes, machine: Machine) -> Group:
    """All ranks that add up a gradient: replicas, shards and context together."""
    return group(mesh.data * mesh.context, mesh.tensor, machine)


def shards_group(mesh: MeshSizes, machine: Machine) -> Group:
    """The ranks over which ZeRO shards: shards and context together."""
    return group(mesh.shards * mesh.context, mesh.tensor, machine)


def expert_data_group(mesh: MeshSizes, machine: Machine) -> Group:
    """The ranks with the same experts, which add up an expert's gradient and share it under ZeRO:
    every `expert`-th data rank, and the context ranks of each."""
    near = min(mesh.context, max(1, machine.devices_per_node // mesh.tensor))
    far = max(1, machine.devices_per_node // (mesh.expert * mesh.context * mesh.tensor))
    return _spread(mesh.expert_data, min(mesh.expert_data, near * far), machine)


def inner_groups(tensor: int, context: int, expert: int, machine: Machine) -> dict[str, Group]:
    """The axes that operators themselves send over, besides `tensor`."""
    return {
        "context": group(context, tensor, machine),
        "expert": group(expert, context * tensor, machine),
    }


def collective_s(kind: Collective, size_bytes: float, where: Group) -> float:
    """Seconds of one collective, nothing hidden.

    t = k (n-1)/n · size / bandwidth + k · latency, k = 2 for an all-reduce, else 1

    size_bytes: of the whole value: what an all-gather makes, a reduce-scatter takes, an all-reduce
    holds; for an all-to-all what all ranks hold together; for a send the message.
    Source: Patarasuk and Yuan 2009, JPDC 69(2), for the ring's bandwidth term.
    """
    n = where.ranks
    if n == 1 or kind in (Collective.NONE, Collective.SLICE) or size_bytes == 0:
        return 0.0
    rounds, pace = where.pace(kind)
    share = (n - 1) / n * size_bytes / where.bandwidth / pace
    latency_s = rounds * where.latency_s
    match kind:
        case Collective.ALL_REDUCE:
            return 2 * (share + latency_s)
        case Collective.ALL_TO_ALL:
            return share / n + latency_s
        case Collective.SEND:
            # a message to the next rank of the ring
            return size_bytes / where.bandwidth / pace + latency_s / (n - 1)
        case _:
            return share + rounds * where.ring_s


def exposed_s(sent_s: float, computing_s: float, overlap: float) -> float:
    """What computing leaves of a collective: it hides at most the share `overlap`."""
    return sent_s - min(overlap * sent_s, computing_s)


def send_s(size_bytes: float, mesh: MeshSizes, machine: Machine) -> float:
    """Seconds of one message between neighbours on the pipeline axis."""
    tensor = axis_group("tensor", mesh, machine)
    part = size_bytes / tensor.ranks if machine.cut_sends else size_bytes
    if mesh.world_size // mesh.pipeline >= machine.devices_per_node:
        sent_s = part / machine.network_bytes_per_s + machine.network_latency_s
    else:
        sent_s = collective_s(Collective.SEND, part, _spread(2, 2, machine))
    if not machine.cut_sends:
        return sent_s
    return sent_s + collective_s(Collective.ALL_GATHER, size_bytes, tensor)
