from dataclasses import replace

import pytest

from llmspec.compiler.cost.hardware import machine_of
from llmspec.compiler.cost.memory import ledger
from llmspec.compiler.cost.recompute import Again
from llmspec.compiler.cost.residence import Residence
from llmspec.compiler.cost.stage import Run, Stage
from llmspec.compiler.cost.types import types_of
from llmspec.compiler.cost.unit import UnitCost
from tests.compiler.specs import cluster, program, tiny_llama

BF16 = types_of(program(tiny_llama(), cluster(1), batch=8).train)
FP32 = types_of(program(tiny_llama(), cluster(1), batch=8, precision="fp32").train)
MACHINE = machine_of(cluster(1), BF16)

BLOCK = UnitCost(
    saved_bytes=1000,
    input_bytes=100,
    output_bytes=100,
    elements=10_000,
    cast_elements=9_000,
    largest_elements=4_000,
)


def stage(recompute: bool = False, count: int = 4) -> Stage:
    again = Again(kept_bytes=100, working_bytes=900, keeps_casts=False)
    return Stage((Run(BLOCK, count, again if recompute else None, True),))


def home(**changes) -> Residence:
    plain = {
        "zero": 0,
        "data": 8,
        "shards": 1,
        "microbatches": 4,
        "in_flight": 1,
        "sends_on": False,
    }
    return Residence(**(plain | changes))


@pytest.mark.parametrize("types", [FP32, BF16])
def test_sixteen_bytes_a_parameter(types):
    found = ledger(stage(), home(), types, MACHINE)
    assert found.parameters + found.gradients + found.optimizer == 16 * 40_000
    assert sum(found.parts().values()) == found.total
    assert types.bytes_per_parameter == 16


def test_a_cast_of_each_weight_is_kept_without_sharding():
    assert ledger(stage(), home(), FP32, MACHINE).activations == 4 * 1000
    assert ledger(stage(), home(), BF16, MACHINE).activations == 4 * (1000 + 2 * 9_000)
    wide = replace(BLOCK, saved_bytes=10**6)
    sharded = ledger(Stage((Run(wide, 4, None, True),)), home(zero=1, shards=8), BF16, MACHINE)
    assert sharded.activations == 4 * 10**6


def test_what_each_level_of_zero_divides():
    found = {z: ledger(stage(), home(zero=z, shards=8), BF16, MACHINE) for z in (1, 2, 3)}
    assert {f.optimizer for f in found.values()} == {8 * 5_000}
    assert {f.parameters for f in found.values()} == {4 * 5_000}
    assert found[1].gradients == 4 * 40_000
    assert found[2].gradients == found[3].gradients == 4 * 5_000
    # a block's gradients as computed, as they are summed, and this rank's part
    summing = 10_000 * (2 + 4) + 4 * 10_000 // 8
    assert found[2].buffers == 2 * 40_000 + summing
    # of weights only those of the block before it
    assert found[3].buffers == 2 * 10_000 + summing
    # whole sums are counted as gradients, and the block's weights have left
    assert found[1].buffers == 2 * (40_000 - 10_000) + 4 * 10_000 + 4 * 10_000 // 8
    assert {f.activations for f in found.values()} == {3 * 1000}


MIXED = replace(
    BLOCK,
    elements=30_000,
    expert_elements=20_000,
    cast_elements=29_000,
    expert_cast_elements=20_000,
)


def test_experts_are_shared_by_the_ranks_that_have_the_same():
    split = Stage((Run(MIXED, 4, None, True),))
    at = {z: ledger(split, home(zero=z, shards=8, expert_shards=2), BF16, MACHINE) for z in (1, 3)}
    part = 4 * (10_000 // 8 + 20_000 // 2)
    assert at[1].parameters == at[3].parameters == 4 * part
    assert at[1].optimizer == 8 * part and at[3].gradients == 4 * part
    assert at[1].gradients == 4 * (4 * 30_000)
    # the largest unit is the experts of a block
    part = 4 * 20_000 // 2
    assert at[1].buffers == 2 * (4 * 30_000 - 20_000) + 4 * 20_000 + part
    assert at[3].buffers == 2 * 30_000 + 20_000 * (2 + 4) + part


def test_experts_that_no_other_rank_has_stay_as_they_are():
    split = Stage((Run(MIXED, 4, None, True),))
    found = ledger(split, home(zero=3, shards=8, expert_shards=1), BF16, MACHINE)
    part = 4 * (10_000 // 8 + 20_000)
    assert found.parameters == 4 * part == found.gradients
    assert found.buffers == 2 * 10_000 + 10_000 * (2 + 4) + 4 * 10_000 // 8
    # each use casts them, and autograd keeps the cast
    assert found.activations == 3 * (1000 + 2 * 20_000)


def test_recomputation_keeps_inputs_and_one_block():
    assert ledger(stage(recompute=True), home(), FP32, MACHINE).activations == 4 * 100 + 900


def test_micro_batches_in_flight_and_outputs_that_were_sent():
    found = ledger(stage(), home(in_flight=3, sends_on=True), FP32, MACHINE)
    assert found.activations == 3 * (4 * 1000 + 100)


def test_alone_gradients_come_as_activations_go():
    big = ledger(stage(), home(data=1, microbatches=1), FP32, MACHINE)
    # the end of the backward: 40 kB · 4 of gradients outweigh the activations
    assert (big.activations, big.gradients) == (0, 160_000)
    light = Stage((Run(UnitCost(saved_bytes=10**6, elements=10), 4, None, True),))
    small = ledger(light, home(data=1, microbatches=1), FP32, MACHINE)
    assert (small.activations, small.gradients) == (4 * 10**6, 0)
