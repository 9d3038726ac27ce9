"""Training with the optimizer, or all of ZeRO 3, in host memory: the same weights, bit for bit."""

import functools

import pytest
import torch

from llmspec.runtime import host, host_optimizer, optimizers
from llmspec.runtime.checkpoint import Checkpoints
from llmspec.runtime.clip import clip_
from llmspec.runtime.errors import UserError
from llmspec.runtime.host_optimizer import on_host
from llmspec.runtime.initialise import initialise
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.replicated_data_parallel import ReplicatedGradients
from llmspec.runtime.sharded_data_parallel import ShardedGradients
from tests.processes import run
from tests.runtime.tiny import LAYERS, SEED, Batch, Stage, global_batch

ROWS, MICROBATCHES, STEPS = 8, 2, 4
OPTIMIZERS = {
    "adamw": {"weight_decay": 0.1},
    "sgd": {"momentum": 0.9, "weight_decay": 0.1},
}
MESHES = [({"shards": 2}, zero) for zero in (1, 2, 3)]
MESHES += [({"replicas": 2}, 0), ({"tensor": 2}, 0)]


class Run:
    """A tiny model on this rank, and what one step of its training does."""

    def __init__(self, sizes: dict[str, int], zero: int, kind: str, where: str):
        self.mesh = Mesh.create("cpu", **sizes)
        self.model = Stage(self.mesh, range(LAYERS))
        away = where == "parameters"
        if zero:
            units = self.model.layer.values()
            self.gradients = ShardedGradients(
                self.model, self.mesh, units=units, zero=zero, on_host=away
            )
        else:
            self.gradients = ReplicatedGradients(self.model, self.mesh)
        initialise(self.model, self.mesh, SEED, on_host=away)
        options = {"lr": 0.1, **OPTIMIZERS[kind]}
        made = getattr(optimizers, kind)(self.model, **options)
        self.optimizer = made if where != "optimizer" else on_host(made, self.mesh)

    def train(self, first: int, stop: int) -> None:
        tokens, targets = global_batch(ROWS)
        data = self.mesh.data
        for step in range(first, stop):
            batch = Batch(
                tokens=tokens.roll(step, 0),
                targets=targets.roll(step, 0),
                data_rank=data.rank,
                data_size=data.size,
            )
            optimizers.set_learning_rate(self.optimizer, 0.1 / (1 + step))
            for micro in batch.microbatches(MICROBATCHES):
                self.gradients.before_microbatch(micro)
                loss = self.model(micro.tokens_BT, micro.targets_BT, micro.samples_B)
                (loss / batch.target_tokens).backward()
            self.gradients.finish()
            clip_(self.model.parameters(), self.mesh, 0.5)
            self.optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        named = dict(self.model.named_parameters())
        return {n: getattr(p, "_local_tensor", p).detach().clone() for n, p in named.items()}


def compared(rank: int, sizes, zero: int, kind: str, where: str, folder: str) -> float:
    """The largest difference of any weight; both ways over a checkpoint are tried too."""
    plain, away = Run(sizes, zero, kind, "device"), Run(sizes, zero, kind, where)
    plain.train(0, STEPS)
    away.train(0, STEPS)
    worst = difference(plain.weights(), away.weights())
    for number, (before, after) in enumerate(((plain, where), (away, "device"))):
        checkpoints = Checkpoints(f"{folder}/{number}", before.mesh)
        checkpoints.save(STEPS, before.model, before.optimizer, wait=True)
        went_on = Run(sizes, zero, kind, after)
        Checkpoints(f"{folder}/{number}", before.mesh).restore(went_on.model, went_on.optimizer)
        went_on.train(STEPS, 2 * STEPS)
        before.train(STEPS, 2 * STEPS)
        worst = max(worst, difference(before.weights(), went_on.weights()))
    assert difference(plain.weights(), Run(sizes, zero, kind, where).weights()) > 0
    return worst


def difference(one, other) -> float:
    assert one.keys() == other.keys()
    return max(float((a - other[n]).abs().max()) if a.numel() else 0.0 for n, a in one.items())


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize(("sizes", "zero"), MESHES, ids=str)
def test_same_weights_from_host_memory(kind, sizes, zero, tmp_path):
    found = run(2, compared, sizes, zero, kind, "optimizer", str(tmp_path))
    assert max(found) == 0.0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_same_weights_with_parameters_in_host_memory(kind, tmp_path):
    assert max(run(2, compared, {"shards": 2}, 3, kind, "parameters", str(tmp_path))) == 0.0


def on_the_device(rank: int) -> tuple[set[str], int]:
    """(state that is not the host's, buckets)."""
    own = Run({}, 0, "adamw", "optimizer")
    own.train(0, 1)
    optimizer = own.optimizer
    named = {f"weights of {n}": optimizer.copies[p] for n, p in own.model.named_parameters()}
    for n, p in own.model.named_parameters():
        assert not host.is_host(p.untyped_storage())
        named |= {f"{k} of {n}": v for k, v in optimizer.state[p].items()}
        assert optimizer.state.get(p)["step"] == 1
    away = {n for n, t in named.items() if not host.is_host(t.untyped_storage())}
    return away, len(optimizer.buckets)


def test_state_is_the_hosts():
    [(on_device, buckets)] = run(1, on_the_device)
    assert not on_device
    assert buckets > host_optimizer._AHEAD, "staging memory is used more than once"


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    def refused(rank: int, folder: str) -> str:
        own = Run({}, 0, "adamw", "optimizer")
        own.train(0, 1)
        Checkpoints(folder, own.mesh).save(1, own.model, own.optimizer, wait=True)
        other = Run({}, 0, "sgd", "optimizer")
        try:
            Checkpoints(folder, own.mesh).restore(other.model, other.optimizer)
        except UserError as error:
            return str(error)
        return ""

    [message] = run(1, functools.partial(refused, folder=str(tmp_path)))
    assert "with the optimizer AdamW, not SGD" in message
