"""Activations in host memory: the same gradients, and less on the device meanwhile."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmspec.runtime import host
from llmspec.runtime.gradients import Turn
from llmspec.runtime.host_activations import HostActivations
from llmspec.runtime.initialise import initialise
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.norms import rms_norm
from llmspec.runtime.parameters import Group, local, parameter
from llmspec.runtime.sharded_data_parallel import ShardedGradients
from tests.processes import run
from tests.runtime.tiny import Constant, Normal

D, BLOCKS = 16, 5


class Block(nn.Module):
    def __init__(self, mesh: Mesh, again: bool):
        super().__init__()
        self.norm = Group(weight=parameter((D,), mesh=mesh, init=Constant(value=1.0)))
        self.up = Group(weight=parameter((4 * D, D), mesh=mesh, init=Normal(std=0.3)))
        self.down = Group(weight=parameter((D, 4 * D), mesh=mesh, init=Normal(std=0.3)))
        self.again = again

    def run(self, x):
        normed = rms_norm(x, local(self.norm.weight), 1e-6)
        wide = F.gelu(F.linear(normed, local(self.up.weight)))
        return x + F.linear(wide, local(self.down.weight))

    def forward(self, x):
        return checkpoint(self.run, x, use_reentrant=False) if self.again else self.run(x)


class Model(nn.Module):
    def __init__(self, mesh: Mesh, *, away: bool, again: bool):
        super().__init__()
        self.blocks = nn.ModuleList([Block(mesh, again) for _ in range(BLOCKS)])
        self.host = HostActivations(mesh) if away else None

    def forward(self, x):
        for block in self.blocks:
            if self.host is None:
                x = block(x)
            else:
                with self.host.keep(block, x):
                    x = block(x)
        return x


def input_of(number: int) -> torch.Tensor:
    return torch.randn(2, 8, D, generator=torch.Generator().manual_seed(number))


def gradients(mesh: Mesh, order: str, *, away: bool, again: bool, zero: int) -> list[torch.Tensor]:
    """order: forwards and backwards, like "F0 F1 B0 B1"."""
    model = Model(mesh, away=away, again=again)
    sharding = None
    if zero:
        sharding = ShardedGradients(model, mesh, units=model.blocks, zero=zero)
    initialise(model, mesh, seed=1)
    outputs, words = {}, order.split()
    backwards = [w for w in words if w[0] == "B"]
    for word in words:
        number = int(word[1:])
        if word[0] == "F":
            outputs[number] = model(input_of(number))
            continue
        if sharding is not None:
            first, last = word == backwards[0], word == backwards[-1]
            sharding.before_microbatch(Turn(first=first, last=last))
        outputs.pop(number).square().sum().backward()
    return [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]


ORDERS = ("F0 B0 F1 B1", "F0 F1 F2 B0 B1 B2", "F0 F1 B0 F2 B1 B2")


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_same_gradients(zero, again):
    def compared(rank: int) -> bool:
        mesh = Mesh.create("cpu", shards=2 if zero else 1)
        for order in ORDERS:
            plain = gradients(mesh, order, away=False, again=again, zero=zero)
            away = gradients(mesh, order, away=True, again=again, zero=zero)
            if not all(map(torch.equal, plain, away)):
                return False
        return True

    assert all(run(2 if zero else 1, compared))


def kept(rank: int, again: bool) -> int:
    """Bytes that one forward sends to host memory."""
    mesh = Mesh.create("cpu")
    model = Model(mesh, away=True, again=again)
    initialise(model, mesh, seed=1)
    out = model(input_of(0))
    assert out.requires_grad
    total = 0
    for visit in chain(model.host.newest):
        for storage in visit.storages.values():
            assert host.is_host(storage.copy.untyped_storage())
            total += storage.copy.nbytes
            there = storage.there is not None
            assert there == (visit is model.host.leaving), "only the last block is on the device"
    return total


def there_after_another(rank: int) -> list[bool]:
    """What is on the device of two models' blocks, their forwards done one after the other."""
    mesh = Mesh.create("cpu")
    models = [Model(mesh, away=True, again=False) for _ in range(2)]
    for model in models:
        initialise(model, mesh, seed=1)
    outs = [model(input_of(0)) for model in models]
    assert all(out.requires_grad for out in outs)
    visits = [visit for model in models for visit in chain(model.host.newest)]
    return [any(s.there is not None for s in visit.storages.values()) for visit in visits]


def test_a_block_leaves_as_that_of_another_model_computes():
    [there] = run(1, there_after_another)
    assert [i for i, here in enumerate(there) if here] == [BLOCKS], "the last one's last"


def chain(visit):
    while visit is not None:
        yield visit
        visit = visit.before


def test_what_leaves():
    row = 4 * 2 * 8 * D
    [found] = run(1, kept, True)
    assert found == BLOCKS * row, "recomputed blocks keep their input alone"
    [found] = run(1, kept, False)
    assert found >= BLOCKS * row * (1 + 4 + 4), "input, wide before and after gelu"


def test_nothing_is_kept_without_gradients():
    def kept_nothing(rank: int) -> bool:
        mesh = Mesh.create("cpu")
        model = Model(mesh, away=True, again=False)
        initialise(model, mesh, seed=1)
        with torch.no_grad():
            model(input_of(0))
        return model.host.newest is None

    assert run(1, kept_nothing) == [True]
