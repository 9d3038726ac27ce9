"""ZeRO 0-3 x tensor x pipeline with a tied embedding: losses, gradients and norms in float64."""

from itertools import product

import pytest
import torch
from torch.distributed.tensor import DTensor

from llmspec.compiler.schedules import Schedule, actions
from llmspec.runtime.clip import clip_
from llmspec.runtime.initialise import initialise
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.pipeline import Executor, TiedWeights
from llmspec.runtime.replicated_data_parallel import ReplicatedGradients
from llmspec.runtime.sharded_data_parallel import ShardedGradients
from tests.processes import run
from tests.runtime import tiny
from tests.runtime.reference import (
    ROWS,
    Reference,
    check_gradients,
    check_loss,
    local_batch,
    one_device,
    own_block,
)

CUTS = {
    1: (0, 3),
    2: (0, 2, 3),
    3: (0, 1, 2, 3),
    4: (0, 1, 1, 2, 3),
}  # a stage without layers is legal


def _build(mesh: Mesh, zero: int, layers: range):
    model = tiny.Stage(mesh, layers)
    gradients: ReplicatedGradients | ShardedGradients
    if zero:
        gradients = ShardedGradients(model, mesh, units=[*model.layer.values()], zero=zero)
    else:
        gradients = ReplicatedGradients(model, mesh)
    initialise(model, mesh, seed=tiny.SEED)
    return model, gradients


def _accumulate(model, gradients, batch, microbatches):
    """As emitted programs without a pipeline do."""
    loss = torch.zeros((), dtype=torch.float64)
    for micro in batch.microbatches(microbatches):
        gradients.before_microbatch(micro)
        part = model(micro.tokens_BT, micro.targets_BT, micro.samples_B) / batch.target_tokens
        part.backward()
        loss = loss + part.detach()
    gradients.finish()
    return loss


def _evaluate(model, gradients, batch, microbatches):
    with gradients.evaluation():
        micros = batch.microbatches(microbatches)
        losses = [model(m.tokens_BT, m.targets_BT, m.samples_B) for m in micros]
    return sum(losses) / batch.target_tokens


def _case(mesh: Mesh, zero: int, schedule: Schedule, microbatches: int, reference: Reference):
    cuts = CUTS[mesh.pipeline.size]
    stage = mesh.pipeline.rank
    model, gradients = _build(mesh, zero, range(cuts[stage], cuts[stage + 1]))
    for name, p in model.named_parameters():
        local = p._local_tensor if isinstance(p, DTensor) else p
        assert torch.equal(local, own_block(reference.parameters[name], p)), name
    batch = local_batch(mesh)
    copies = []
    if mesh.pipeline.size == 1:
        evaluate = lambda: _evaluate(model, gradients, batch, microbatches)  # noqa: E731
        step = lambda: _accumulate(model, gradients, batch, microbatches)  # noqa: E731
    else:
        stages = mesh.pipeline.size
        executor = Executor(
            stages={stage: model},
            gradients={stage: gradients},
            actions=actions(schedule, stages, stages, microbatches, zero),
            mesh=mesh,
            microbatches=microbatches,
            boundary=(
                (
                    ROWS // (microbatches * mesh.data.size),
                    tiny.T // mesh.tensor.size,
                    tiny.D,
                ),
                tiny.TYPE,
            ),
            tied=[TiedWeights("embed.weight", 0, stages - 1)],
        )
        copies = executor.copies()
        step, evaluate = (lambda: executor.step(batch)), (lambda: executor.evaluate(batch))
    # evaluation between steps must leave nothing behind; the second step, nothing of the first
    for _ in range(2):
        check_loss(evaluate(), reference.evaluated, mesh)
        check_loss(step(), reference.loss, mesh)
        check_gradients(model, reference, scale=1.0)
    norm = clip_(model.parameters(), mesh, 0.1, counted_elsewhere=copies)
    torch.testing.assert_close(norm, reference.norm, rtol=1e-10, atol=0)
    check_gradients(model, reference, scale=0.1 / (reference.norm + 1e-6))


def _cases(rank: int, sizes: dict[str, int], zeros, schedules, microbatches) -> None:
    mesh, reference = Mesh.create("cpu", **sizes), one_device()
    for zero, schedule, count in product(zeros, schedules, microbatches):
        try:
            _case(mesh, zero, schedule, count, reference)
        except AssertionError as error:
            raise AssertionError(
                f"{sizes}, zero {zero}, {schedule}, {count} micro-batches"
            ) from error


GPIPE, BOTH = [Schedule.GPIPE], [Schedule.GPIPE, Schedule.ONE_F_ONE_B]
SPLIT = [Schedule.ZERO_BUBBLE]


@pytest.mark.parametrize(
    ("sizes", "zeros", "schedules", "microbatches"),
    [
        ({}, [0], GPIPE, [1, 2]),
        ({"shards": 2}, [0, 1, 2, 3], GPIPE, [1, 2, 4]),
        ({"replicas": 2}, [0], GPIPE, [1, 2]),
        ({"shards": 3}, [0, 1, 2, 3], GPIPE, [1, 2]),
        ({"tensor": 2}, [0], GPIPE, [1, 2]),
        ({"pipeline": 2}, [0], BOTH, [1, 2, 4]),
        ({"replicas": 2, "shards": 2}, [0, 1, 2, 3], GPIPE, [1, 2]),
        ({"shards": 2, "tensor": 2}, [0, 1, 2, 3], GPIPE, [1, 2]),
        ({"tensor": 4}, [0], GPIPE, [2]),
        ({"pipeline": 4}, [0], BOTH, [1, 2, 4]),
        ({"pipeline": 2, "shards": 2}, [0, 1, 2, 3], BOTH, [1, 2, 4]),
        ({"pipeline": 2, "shards": 2}, [0, 1, 2, 3], SPLIT, [1, 4]),
        # the middle stage has layers and nothing else
        ({"pipeline": 3, "shards": 2}, [1, 2, 3], BOTH[1:], [2]),
        ({"pipeline": 2, "shards": 2, "tensor": 2}, [0, 1, 2, 3], BOTH, [2]),
        pytest.param(
            *({"pipeline": 2, "shards": 2, "tensor": 2}, [0, 1, 2, 3], BOTH + SPLIT, [1, 4]),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *({"pipeline": 2, "replicas": 2, "shards": 2}, [0, 1, 2, 3], BOTH + SPLIT, [3]),
            marks=pytest.mark.long,
        ),
    ],
    ids=lambda value: "-".join(map(str, value.items())) if isinstance(value, dict) else None,
)
def test_equals_one_device(sizes, zeros, schedules, microbatches):
    world = 1
    for size in sizes.values():
        world *= size
    run(world, _cases, sizes, zeros, schedules, microbatches, timeout_s=240)
