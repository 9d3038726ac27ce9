"""What each ZeRO level gathers and reduces, counted; that gradients are right: test_combined.py."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llmspec.runtime.gradients import Turn
from llmspec.runtime.initialise import Normal, initialise
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.parameters import Group, local, parameter
from llmspec.runtime.sharded_data_parallel import ShardedGradients
from tests.processes import run
from tests.runtime.traffic import Traffic

UNITS = 3


class _Layer(nn.Module):
    def __init__(self, mesh: Mesh):
        super().__init__()
        self.up = Group(weight=parameter((8, 8), mesh=mesh, init=Normal(std=0.3)))
        self.seen: list[torch.dtype] = []

    def forward(self, x):
        self.seen.append(local(self.up.weight).dtype)
        return x + torch.tanh(x.to(self.seen[-1]) @ local(self.up.weight)).to(x.dtype)


class _Model(nn.Module):
    def __init__(self, mesh: Mesh):
        super().__init__()
        self.layers = nn.ModuleList([_Layer(mesh) for _ in range(UNITS)])
        self.head = Group(weight=parameter((8, 2), mesh=mesh, init=Normal(std=0.3)))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return (x @ local(self.head.weight).to(x.dtype)).square().sum()


def _build(mesh: Mesh, zero: int, **types):
    model = _Model(mesh)
    gradients = ShardedGradients(model, mesh, units=model.layers, zero=zero, **types)
    initialise(model, mesh, seed=1)
    return model, gradients


def _traffic(rank: int, sizes: dict[str, int], zero: int, microbatches: int) -> dict[str, int]:
    model, gradients = _build(Mesh.create("cpu", **sizes), zero)

    def step():
        for i in range(microbatches):
            gradients.before_microbatch(Turn(first=i == 0, last=i == microbatches - 1))
            model(torch.ones(2, 8)).backward()
        gradients.finish()

    step()
    with Traffic() as traffic:
        step()
    assert all(isinstance(p, DTensor) for p in model.parameters()), "released after a step"
    return dict(traffic.counts)


# units and root: UNITS + 1 groups; the root keeps its parameters from forward to backward
GROUPS = UNITS + 1


@pytest.mark.parametrize(
    ("zero", "gathers", "scatters"),
    [
        (1, GROUPS, GROUPS),
        (2, GROUPS, 4 * GROUPS),
        (3, 4 * (GROUPS + UNITS), 4 * GROUPS),
    ],
)
def test_traffic_is_what_the_level_says(zero, gathers, scatters):
    expected = {"allgather_base": gathers, "reduce_scatter_base": scatters}
    assert run(2, _traffic, {"shards": 2}, zero, 4) == [expected] * 2


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_replicas_are_summed_once_a_step(zero):
    for counts in run(4, _traffic, {"replicas": 2, "shards": 2}, zero, 4):
        assert counts["allreduce"] == GROUPS


def _types(rank: int) -> None:
    mesh = Mesh.create("cpu", shards=2)
    model, gradients = _build(mesh, 2, compute=torch.bfloat16, reduce=torch.float32)
    gradients.before_microbatch(Turn(first=True, last=True))
    with Traffic() as traffic:
        model(torch.ones(2, 8)).backward()
    gradients.finish()
    assert model.layers[0].seen == [torch.bfloat16]
    assert traffic.dtypes["reduce_scatter_base"] == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_compute_and_reduce_types():
    run(2, _types)


def _evaluation(rank: int) -> None:
    for zero in (1, 2, 3):
        model, gradients = _build(Mesh.create("cpu", shards=2), zero)
        with gradients.evaluation():
            assert not model.training
            loss = model(torch.ones(2, 8))
        assert model.training and not loss.requires_grad
        assert all(isinstance(p, DTensor) for p in model.parameters())


def test_evaluation_leaves_sharded_parameters():
    run(2, _evaluation)


def _context(rank: int, sizes: dict[str, int]) -> None:
    mesh = Mesh.create("cpu", **sizes)
    assert mesh.reduction.size == 4
    for zero in (1, 3):
        model, gradients = _build(mesh, zero)
        gradients.before_microbatch(Turn(first=True, last=True))
        model(torch.full((2, 8), 0.1 * mesh.reduction.rank)).backward()
        gradients.finish()
        found = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
        whole = _Model(mesh)
        initialise(whole, mesh, seed=1)
        sum(whole(torch.full((2, 8), 0.1 * r)) for r in range(4)).backward()
        for name, p in whole.named_parameters():
            torch.testing.assert_close(found[name], p.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "sizes",
    [
        {"context": 4},
        {"shards": 2, "context": 2},
        {"replicas": 2, "context": 2},
    ],
)
def test_context_ranks_share_gradient_sums(sizes):
    run(4, _context, sizes)


def _hybrid(rank: int) -> None:
    """Eight ranks: two replicas of parts over shards and context together."""
    mesh = Mesh.create("cpu", replicas=2, shards=2, context=2)
    model, gradients = _build(mesh, 2)
    assert {p.to_local().numel() for p in model.parameters()} != {0}
    for first in (True, False):
        gradients.before_microbatch(Turn(first=first, last=not first))
        model(torch.full((2, 8), 0.1 * rank)).backward()
    gradients.finish()
    whole = _Model(mesh)
    initialise(whole, mesh, seed=1)
    sum(2 * whole(torch.full((2, 8), 0.1 * r)) for r in range(8)).backward()
    for (_, p), (_, q) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert p.device_mesh.shape == (2, 4)
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-5, atol=1e-6)


def test_hybrid_sharding_with_context_ranks():
    run(8, _hybrid)
