from dataclasses import replace

import pytest

from llmspec.compiler.cost.data import BUCKET_BYTES, DataGroups, data_cost
from llmspec.compiler.cost.hardware import machine_of
from llmspec.compiler.cost.network import axis_group, collective_s, data_group, expert_data_group
from llmspec.compiler.cost.stage import Run, Stage
from llmspec.compiler.cost.types import types_of
from llmspec.compiler.cost.unit import UnitCost
from llmspec.compiler.placement import Collective
from llmspec.compiler.plan import MeshSizes
from tests.compiler.specs import cluster, program, tiny_llama

TYPES = types_of(program(tiny_llama(), cluster(2), batch=8).train)
MACHINE = machine_of(cluster(2), TYPES)
MILLION = 10**6


def stage(forward_s: float) -> Stage:
    cost = UnitCost(forward_s=forward_s, backward_s=2 * forward_s, elements=100 * MILLION)
    return Stage((Run(cost, 4, False, True),))


def groups(replicas: int, shards: int, expert: int = 1) -> DataGroups:
    mesh = MeshSizes(replicas=replicas, shards=shards, expert=expert)
    return DataGroups(
        experts=expert_data_group(mesh, MACHINE),
        shards=axis_group("shards", mesh, MACHINE),
        replicas=axis_group("replicas", mesh, MACHINE),
        data=data_group(mesh, MACHINE),
    )


def cost(zero: int, forward_s: float = 0.0, replicas: int = 1, shards: int = 8):
    return data_cost(stage(forward_s), zero, 4, groups(replicas, shards), TYPES, MACHINE)


def test_one_data_rank_sends_nothing():
    assert cost(0, shards=1).sends == ()


def test_nothing_to_hide_behind_leaves_everything_exposed():
    size, where = 4 * 400 * MILLION, groups(8, 1).data
    found = cost(0, replicas=8, shards=1)
    whole = collective_s(Collective.ALL_REDUCE, size, where)
    assert whole < found.last_s < whole * 1.25  # each bucket has its own latency
    gather = collective_s(Collective.ALL_GATHER, 2 * 100 * MILLION, groups(1, 8).shards)
    assert cost(1).first_s == pytest.approx(5 * gather)  # and the first one opens


def test_computing_hides_all_but_the_ends():
    busy = cost(0, forward_s=10.0, replicas=8, shards=1)
    tail = collective_s(Collective.ALL_REDUCE, BUCKET_BYTES, groups(8, 1).data)
    idle = cost(0, replicas=8, shards=1)
    assert tail < busy.last_s < 0.15 * idle.last_s
    assert cost(3, forward_s=10.0).forward_s < cost(3).forward_s


def test_how_often_each_level_sends():
    often = {z: {kind: n for kind, _, _, n in cost(z).sends} for z in (1, 2, 3)}
    # each of four blocks by itself
    assert often[1] == {"all_gather": 4, "reduce_scatter": 4}
    assert often[2] == {"all_gather": 4, "reduce_scatter": 16}
    assert often[3] == {"all_gather": 32, "reduce_scatter": 16}
    sizes = {kind: size for kind, _, size, _ in cost(3).sends}
    assert sizes == {"all_gather": 2 * 100 * MILLION, "reduce_scatter": 4 * 100 * MILLION}


def test_replicas_of_shards_sum_once():
    found = cost(3, replicas=2, shards=8)
    part = 4 * 100 * MILLION // 8
    assert ("all_reduce", "replicas", part, 4) in found.sends
    assert found.last_s > 0 and cost(3).last_s == 0


def test_experts_travel_between_the_ranks_that_have_the_same():
    cost = UnitCost(elements=100 * MILLION, expert_elements=75 * MILLION)
    split = Stage((Run(cost, 4, False, True),))
    for zero, kind, width in ((0, "all_reduce", 4), (3, "all_gather", 2)):
        of_two = data_cost(split, zero, 4, groups(1, 8, expert=4), TYPES, MACHINE)
        # ZeRO gathers each of four blocks by itself
        uses = 4 if zero else 1
        sizes = {axis: size * uses for k, axis, size, _ in of_two.sends if k == kind}
        shared = "shards" if zero else "data"
        assert sizes == {shared: width * 100 * MILLION, "expert_data": width * 300 * MILLION}
        alone = data_cost(split, zero, 4, groups(1, 8, expert=8), TYPES, MACHINE)
        assert {axis for _, axis, _, _ in alone.sends} == {shared}
        assert alone.last_s + alone.forward_s < of_two.last_s + of_two.forward_s


def test_software_that_sums_whole_gradients_sends_twice_as_much():
    whole = replace(MACHINE, whole_sums=True)
    of = {zero: data_cost(stage(0.0), zero, 4, groups(1, 8), TYPES, whole) for zero in (1, 2)}
    more = of[1].last_s - cost(1).last_s
    scatter = collective_s(Collective.REDUCE_SCATTER, 4 * 100 * MILLION, groups(1, 8).shards)
    # four blocks, and the last of them once more: nothing runs behind it
    assert more == pytest.approx(5 * scatter, rel=0.01)
    assert ("all_reduce", "shards", 4 * 100 * MILLION, 4) in of[1].sends
    assert of[2] == cost(2)
