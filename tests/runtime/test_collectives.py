import pytest
import torch

from llmspec.runtime import collectives as c
from llmspec.runtime.mesh import Axis, Mesh
from tests.processes import run


def _values(rank: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _check(out, x, expected, expected_gradient, weight):
    """Compare the value, and the gradient of (out * weight).sum()."""
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert out.is_contiguous()
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


def _gathering(rank: int, n: int, axis: Axis, dim: int) -> None:
    xs = [_values(r, 2, 4, 8).requires_grad_() for r in range(n)]
    x, whole = xs[rank], torch.cat([x.detach() for x in xs], dim)
    weights = [_values(100 + r, *whole.shape) for r in range(n)]
    own = lambda t: t.chunk(n, dim)[rank]  # noqa: E731
    _check(c.all_gather(x, dim, axis), x, whole, own(sum(weights)), weights[rank])
    gathered = c.all_gather_replicated(x, dim, axis)
    _check(gathered, x, whole, own(weights[0]), weights[0])


def _scattering(rank: int, n: int, axis: Axis, dim: int) -> None:
    xs = [_values(r, 4, 8, 12).requires_grad_() for r in range(n)]
    x, total = xs[rank], sum(x.detach() for x in xs)
    own = total.chunk(n, dim)[rank]
    weights = [_values(100 + r, *own.shape) for r in range(n)]
    gathered = torch.cat(weights, dim)
    _check(c.reduce_scatter(x, dim, axis), x, own, gathered, weights[rank])
    own = x.detach().chunk(n, dim)[rank]
    _check(c.split(x, dim, axis), x, own, gathered, weights[rank])
    zeros = [torch.zeros_like(w) for w in weights]
    zeros[rank] = weights[rank]
    part = c.narrow(x, dim, axis).contiguous()
    _check(part, x, own, torch.cat(zeros, dim), weights[rank])


def _reducing(rank: int, n: int, axis: Axis) -> None:
    xs = [_values(r, 3, 5).requires_grad_() for r in range(n)]
    x, total = xs[rank], sum(x.detach() for x in xs)
    before = x.detach().clone()
    weights = [_values(100 + r, 3, 5) for r in range(n)]
    _check(c.all_reduce(x, axis), x, total, weights[rank], weights[rank])
    _check(c.sum_gradient(x, axis), x, x.detach(), sum(weights), weights[rank])
    _check(c.all_reduce_both(x, axis), x, total, sum(weights), weights[rank])
    assert torch.equal(x, before), "inputs stay as they are"


def _exchanging(rank: int, n: int, axis: Axis, split_dim: int, concat_dim: int) -> None:
    xs = [_values(r, 4, 8, 12).requires_grad_() for r in range(n)]
    x = xs[rank]
    expected = torch.cat([y.detach().chunk(n, split_dim)[rank] for y in xs], concat_dim)
    weights = [_values(100 + r, *expected.shape) for r in range(n)]
    gradient = torch.cat([w.chunk(n, concat_dim)[rank] for w in weights], split_dim)
    out = c.all_to_all(x, split_dim, concat_dim, axis)
    _check(out, x, expected, gradient, weights[rank])


def _all_cases(rank: int, n: int) -> None:
    axis = Mesh.create("cpu", tensor=n).tensor
    _reducing(rank, n, axis)
    for dim in (0, 1, 2, -1):
        _gathering(rank, n, axis, dim)
        _scattering(rank, n, axis, dim)
        for other in (0, 1, 2):
            if other != dim % 3:
                _exchanging(rank, n, axis, dim, other)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.full((n, 3), float(rank + 1), dtype=dtype)
        total = float(n * (n + 1) // 2)
        assert c.all_reduce(x, axis).eq(total).all()
        assert c.reduce_scatter(x, 0, axis).eq(total).all()
    if n > 1:
        with pytest.raises(AssertionError, match="does not split over"):
            c.split(torch.zeros(n + 1), 0, axis)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_values_and_gradients(world):
    run(world, _all_cases, world)


@pytest.mark.parametrize("size", [0, 1, 3, 5, 8, 13])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_chunk_bounds_are_those_of_torch_chunk(size, ranks):
    values = torch.arange(size)
    chunks = list(values.chunk(ranks)) if size else []
    for rank in range(ranks):
        start, stop = c.chunk_bounds(size, Axis(name="tensor", rank=rank, size=ranks, group=None))
        expected = chunks[rank] if rank < len(chunks) else values[:0]
        assert torch.equal(values[start:stop], expected)
