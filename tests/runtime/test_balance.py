"""Biases of experts, moved after a step by the load of the whole batch."""

import pytest
import torch
from torch import nn

from llmspec.runtime.balance import balance_experts
from llmspec.runtime.initialise import Constant, initialise
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.parameters import Group, buffer
from tests.processes import run

ZERO = Constant(value=0.0)


def layer(experts: int, rate: float | None) -> nn.Module:
    load = buffer((2, experts), init=ZERO, dtype=torch.int64, kept=False)
    if rate is None:
        return Group(load=load)
    return Group(load=load, bias=buffer((experts,), init=ZERO, rate=rate))


def balanced(rank: int, axes: dict[str, int]) -> tuple[list[float], list[str], dict[str, float]]:
    """Two layers: one with a bias, that ranks load unlike, and one without."""
    mesh = Mesh.create("cpu", **axes)
    model = Group(first=layer(4, 0.5), second=layer(2, None))
    initialise(model, mesh, seed=1)
    chosen = torch.tensor([8, 0, 2, 2] if mesh.reduction.rank == 0 else [0, 0, 4, 8])
    model.first.load[0] += chosen
    model.first.load[1, 0] += 3
    model.second.load[0] += torch.tensor([1, 3])
    figures = balance_experts([model], mesh)
    assert not model.first.load.any() and not model.second.load.any()
    return (
        model.first.bias.tolist(),
        sorted(model.state_dict()),
        {name: float(value) for name, value in figures.items()},
    )


def test_alone() -> None:
    ((bias, kept, figures),) = run(1, balanced, {})
    # 8, 0, 2, 2 around a mean of 3
    assert bias == [-0.5, 0.5, 0.5, 0.5]
    assert kept == ["first.bias"], "counts are no part of a checkpoint"
    assert figures == {"expert_load": pytest.approx(8 / 3), "dropped": 0.25}


@pytest.mark.parametrize("axis", ["replicas", "shards", "context"])
def test_the_whole_batch_counts(axis: str) -> None:
    for bias, _, figures in run(2, balanced, {axis: 2}):
        # 8, 0, 6, 10 around a mean of 6
        assert bias == [-0.5, 0.5, 0.0, -0.5]
        assert figures == {"expert_load": pytest.approx(10 / 6), "dropped": 0.25}


@pytest.mark.parametrize("axis", ["tensor", "pipeline"])
def test_other_ranks_do_not_count_again(axis: str) -> None:
    for bias, _, figures in run(2, balanced, {axis: 2}):
        assert bias == [-0.5, 0.5, 0.5, 0.5]
        assert figures["expert_load"] == pytest.approx(8 / 3)
