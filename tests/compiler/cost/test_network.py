from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmspec.compiler.cost.hardware import machine_of
from llmspec.compiler.cost.network import (
    axis_group,
    collective_s,
    data_group,
    expert_data_group,
    group,
    send_s,
)
from llmspec.compiler.cost.types import types_of
from llmspec.compiler.placement import Collective
from llmspec.compiler.plan import MeshSizes
from tests.compiler.specs import cluster, program, tiny_llama

SPEC = program(tiny_llama(), cluster(4), batch=8)
MACHINE = machine_of(SPEC.cluster, types_of(SPEC.train))
SENDING = [
    Collective.ALL_REDUCE,
    Collective.ALL_GATHER,
    Collective.REDUCE_SCATTER,
    Collective.ALL_TO_ALL,
]


@given(
    st.sampled_from(SENDING),
    st.integers(1, 2**34),
    st.integers(1, 2**30),
    st.sampled_from([2, 4, 8, 16, 32]),
    st.sampled_from([1, 2, 8]),
)
def test_cost_grows_with_bytes(kind, size, more, ranks, stride):
    where = group(ranks, stride, MACHINE)
    assert 0 < collective_s(kind, size, where) < collective_s(kind, size + more, where)


@given(st.integers(1, 2**34), st.sampled_from([2, 4, 8, 32]))
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(size, ranks):
    where = group(ranks, 1, MACHINE)
    parts = (Collective.REDUCE_SCATTER, Collective.ALL_GATHER)
    both = sum(collective_s(kind, size, where) for kind in parts)
    one = collective_s(Collective.ALL_REDUCE, size, where)
    if where.crosses_nodes:  # a tree spares hops, and only a sum has one
        assert one <= both * (1 + 1e-9)
    else:
        assert one == pytest.approx(both)


def test_alone_nothing_is_sent():
    assert collective_s(Collective.ALL_REDUCE, 10**9, group(1, 1, MACHINE)) == 0


def test_which_wires_an_axis_uses():
    mesh = MeshSizes(pipeline=2, replicas=1, shards=4, tensor=4)
    tensor, shards = (axis_group(a, mesh, MACHINE) for a in ("tensor", "shards"))
    assert (tensor.inside, tensor.crosses_nodes) == (4, False)
    assert (shards.inside, shards.crosses_nodes) == (2, True)
    assert tensor.bandwidth == MACHINE.link_bytes_per_s
    assert shards.bandwidth == 2 * MACHINE.network_bytes_per_s
    assert data_group(mesh, MACHINE).ranks == 4
    assert send_s(0, mesh, MACHINE) == MACHINE.network_latency_s


def test_a_ring_of_eight_on_nvlink():
    """2 · 7/8 · 1 GB at 360 GB/s, and two rounds of seven hops."""
    where = group(8, 1, MACHINE)
    expected = 2 * (7 / 8 * 1e9 / 360e9 + 7 * 2e-6)
    assert collective_s(Collective.ALL_REDUCE, 1e9, where) == pytest.approx(expected)


def test_the_ranks_with_the_same_experts():
    two_nodes = {"replicas": 1, "shards": 16}
    inside = {
        expert: expert_data_group(MeshSizes(**two_nodes, expert=expert), MACHINE)
        for expert in (1, 2, 8, 16)
    }
    assert {e: (g.ranks, g.inside) for e, g in inside.items()} == {
        1: (16, 8),
        2: (8, 4),
        8: (2, 1),
        16: (1, 1),
    }
    mixed = MeshSizes(shards=8, context=2, expert=8)
    assert expert_data_group(mixed, MACHINE).inside == 2  # the context ranks of one data rank


def test_a_message_that_tensor_ranks_cut_goes_in_parts_and_is_gathered():
    mesh = MeshSizes(pipeline=8, tensor=4, shards=2)
    machine = replace(MACHINE, devices_per_node=8)
    size, cut = 10**9, replace(machine, cut_sends=True)
    part = send_s(size // 4, mesh, machine)
    gathered = collective_s(Collective.ALL_GATHER, size, axis_group("tensor", mesh, machine))
    assert send_s(size, mesh, cut) == pytest.approx(part + gathered)
    alone = MeshSizes(pipeline=8, shards=8)
    assert send_s(size, alone, cut) == send_s(size, alone, machine)


def test_rings_between_nodes_may_reach_less_of_the_network_than_messages():
    slow = replace(MACHINE, devices_per_node=8, network_latency_s=0.0, link_latency_s=0.0)
    quarter = replace(slow, ring_share=0.25)
    mesh = MeshSizes(pipeline=2, shards=16)
    one, four = (
        collective_s(Collective.ALL_GATHER, 10**9, group(16, 8, m)) for m in (slow, quarter)
    )
    assert four == pytest.approx(4 * one)
    assert send_s(10**9, mesh, quarter) == send_s(10**9, mesh, slow)
