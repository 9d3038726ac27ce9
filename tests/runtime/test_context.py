"""The order of tokens over context ranks, and what moves them."""

import pytest
import torch

from llmspec.runtime import context as c
from llmspec.runtime.mesh import Axis, Mesh
from tests.processes import run


def _values(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def axis_of(rank: int, size: int) -> Axis:
    return Axis(name="context", rank=rank, size=size, group=None)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_token_has_one_rank(ranks: int) -> None:
    parts = [c.token_positions(axis_of(r, ranks), 24 // ranks) for r in range(ranks)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(24))
    for rank, part in enumerate(parts):
        assert torch.equal(part, part.sort().values), "chunks stand in order"
        assert torch.equal(part, c.own_tokens(torch.arange(24), 0, axis_of(rank, ranks)))


@pytest.mark.parametrize("ranks", [2, 4])
def test_causal_work_is_the_same_on_every_rank(ranks: int) -> None:
    """Keys that a rank's tokens see."""
    parts = [c.token_positions(axis_of(r, ranks), 32 // ranks) + 1 for r in range(ranks)]
    assert len({int(p.sum()) for p in parts}) == 1


def _gradient(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    return gradient


def _moving(rank: int, n: int) -> None:
    axis = Mesh.create("cpu", context=n).context
    for dim in (1, 2):
        whole = _values(0, 3, 4 * n, 4 * n, 5)
        x = c.own_tokens(whole, dim, axis).requires_grad_()
        gathered = c.gather_tokens(x, dim, axis)
        assert torch.equal(gathered, whole)
        weights = [_values(10 + r, *whole.shape) for r in range(n)]
        expected = c.own_tokens(sum(weights), dim, axis)  # type: ignore[arg-type]
        torch.testing.assert_close(_gradient(gathered, x, weights[rank]), expected)
    whole = _values(1, 2, 4 * n, 2 * n, 3)
    x = c.own_tokens(whole, 1, axis).requires_grad_()
    heads = c.tokens_to_heads(x, axis)
    assert torch.equal(heads, whole.chunk(n, 2)[rank])
    assert torch.equal(c.heads_to_tokens(heads, axis), x)
    weight = _values(2, *whole.shape)
    expected = c.own_tokens(weight, 1, axis)
    assert torch.equal(_gradient(heads, x, weight.chunk(n, 2)[rank]), expected)
    assert torch.equal(_gradient(c.heads_to_tokens(heads, axis), x, expected), expected)


@pytest.mark.parametrize("n", [2, 4])
def test_moving_tokens(n: int) -> None:
    run(n, _moving, n)


def _refusing(rank: int) -> str:
    axis = Mesh.create("cpu", context=2).context
    with pytest.raises(AssertionError, match="3 heads do not divide over 2 context ranks"):
        c.tokens_to_heads(torch.zeros(1, 4, 3, 2), axis)
    with pytest.raises(AssertionError, match=r"dim 1 .* is no whole number of 4 chunks"):
        c.own_tokens(torch.zeros(1, 6), 1, axis)
    return "refused"


def test_what_does_not_divide() -> None:
    assert run(2, _refusing) == ["refused"] * 2
