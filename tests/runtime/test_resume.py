"""Data, optimizers, learning rates, checkpoints and metrics together, as a trainer has them."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # optimizers import it: once here, not in every forked rank
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from llmspec.runtime import batches, learning_rate, optimizers
from llmspec.runtime.checkpoint import Checkpoints
from llmspec.runtime.clip import clip_
from llmspec.runtime.collectives import all_reduce, sum_gradient
from llmspec.runtime.context_attention import ring_attention
from llmspec.runtime.initialise import Constant, Normal, initialise
from llmspec.runtime.loss import (
    vocabulary_parallel_cross_entropy_sum,
    vocabulary_parallel_embedding,
)
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.metrics import Metrics
from llmspec.runtime.norms import rms_norm
from llmspec.runtime.parameters import Group, local, parameter
from llmspec.runtime.replicated_data_parallel import ReplicatedGradients
from llmspec.runtime.rotary import rotary
from llmspec.runtime.sharded_data_parallel import ShardedGradients
from tests.processes import run

VOCAB, WIDTH, STEPS = 37, 16, 12


class Model(nn.Module):
    def __init__(self, mesh: Mesh):
        super().__init__()
        init, options = Normal(std=0.3), {"mesh": mesh, "dtype": torch.float64}
        self.tensor, self.context = mesh.tensor, mesh.context
        table = parameter((VOCAB, WIDTH), init=init, split={"tensor": 0}, **options)
        self.embed = Group(weight=table)
        self.norm = Group(weight=parameter((WIDTH,), init=Constant(value=1.0), **options))
        self.queries = Group(weight=parameter((WIDTH, WIDTH), init=init, **options))

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor, samples_B: Tensor) -> Tensor:
        table_vD = local(self.embed.weight)
        part = vocabulary_parallel_embedding(tokens_BT, table_vD, VOCAB, self.tensor)
        x_BTD = all_reduce(part, self.tensor)
        q_BTHE = F.linear(x_BTD, local(self.queries.weight)).unflatten(-1, (2, WIDTH // 2))
        q_BTHE = rotary(q_BTHE, 100.0, context=self.context)
        mixed_BTHE = ring_attention(q_BTHE, q_BTHE, q_BTHE, self.context, causal=True)
        x_BTD = x_BTD + mixed_BTHE.flatten(2)
        x_BTD = rms_norm(x_BTD, local(self.norm.weight), 1e-5)
        logits_BTv = F.linear(sum_gradient(x_BTD, self.tensor), table_vD)
        return vocabulary_parallel_cross_entropy_sum(logits_BTv, targets_BT, VOCAB, self.tensor)


def train(rank: int, folder: Path, sizes: dict[str, int], zero: int, until: int) -> None:
    mesh = Mesh.create("cpu", **sizes)
    model = Model(mesh)
    gradients: ReplicatedGradients | ShardedGradients
    if zero:
        gradients = ShardedGradients(model, mesh, units=[], zero=zero)
    else:
        gradients = ReplicatedGradients(model, mesh)
    initialise(model, mesh, seed=1)
    optimizer = optimizers.adamw(model, lr=0.0, weight_decay=0.1)
    rate = learning_rate.schedule(0.02, STEPS, learning_rate.warmup(3), learning_rate.cosine(to=0))
    data = batches.tokens("*.bin", root=str(folder), sequence_length=8, vocab=VOCAB, seed=2)
    checkpoints = Checkpoints(str(folder / "checkpoints"), mesh, keep=2)
    done = checkpoints.restore(model, optimizer)
    first = done["step"] if done else 0
    log = Metrics(
        str(folder / "log.jsonl"), mesh, steps=STEPS, tokens_per_step=8 * 8, first=first, every_s=0
    )
    for step in range(first, until):
        batch = data.batch(step, 8, mesh)
        loss = torch.zeros((), dtype=torch.float64)
        for micro in batch.microbatches(2):
            gradients.before_microbatch(micro)
            part = model(micro.tokens_BT, micro.targets_BT, micro.samples_B) / batch.target_tokens
            part.backward()
            loss = loss + part.detach()
        gradients.finish()
        norm = clip_(model.parameters(), mesh, 1.0)
        optimizers.set_learning_rate(optimizer, rate(step))
        optimizer.step()
        with contextlib.redirect_stdout(io.StringIO()):
            log.step(step + 1, loss, norm, rate(step))
        if (step + 1) % 4 == 0:
            log.flush()
            checkpoints.save(step + 1, model, optimizer)
    log.close()
    checkpoints.wait()
    dist.barrier()


def curve(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in rows]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    text = np.random.default_rng(0).integers(0, VOCAB, 400).repeat(2).astype("uint16")
    for name in ("straight", "broken"):
        (tmp_path / name).mkdir()
        text.tofile(tmp_path / name / "text.bin")
    return tmp_path / "straight", tmp_path / "broken"


@pytest.mark.parametrize(
    "sizes, zero",
    [
        ({}, 0),
        ({"shards": 2}, 3),
        ({"tensor": 2}, 0),
        pytest.param({"context": 2}, 2, marks=pytest.mark.long),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(folders, sizes: dict[str, int], zero: int):
    straight, broken = folders
    world = int(np.prod(list(sizes.values()) or [1]))
    run(world, train, straight, sizes, zero, STEPS)
    run(world, train, broken, sizes, zero, 6)  # stops after step 6, its checkpoint is step 4
    run(world, train, broken, sizes, zero, STEPS)
    assert curve(broken) == curve(straight)
    assert curve(straight)[-1] < curve(straight)[0] - 0.3


def test_another_plan_goes_on_within_rounding(folders):
    straight, broken = folders
    run(1, train, straight, {}, 0, STEPS)
    run(2, train, broken, {"shards": 2}, 2, 6)
    run(4, train, broken, {"replicas": 2, "tensor": 2}, 0, 9)
    run(4, train, broken, {"shards": 2, "tensor": 2}, 3, STEPS)
    np.testing.assert_allclose(curve(broken), curve(straight), rtol=1e-9)


def test_context_ranks_go_on_within_rounding(folders):
    straight, broken = folders
    run(1, train, straight, {}, 0, STEPS)
    run(4, train, broken, {"replicas": 2, "context": 2}, 1, 6)
    run(2, train, broken, {"context": 2}, 0, 9)
    run(4, train, broken, {"context": 2, "tensor": 2}, 3, STEPS)
    np.testing.assert_allclose(curve(broken), curve(straight), rtol=1e-9)
