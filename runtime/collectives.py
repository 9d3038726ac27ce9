"""Differentiable collectives on local tensors over one mesh axis; each names its backward.

An axis of size 1 is the identity. Splits are even; `chunk_bounds` knows the uneven ones.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Axis


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the ranks; backward: the gradient as it is."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis, True, False)


def sum_gradient(x: Tensor, axis: Axis) -> Tensor:
    """The value as it is; backward: sum over the ranks."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis, False, True)


def all_reduce_both(x: Tensor, axis: Axis) -> Tensor:
    """Sum over the ranks, forward and backward."""
    return x if axis.size == 1 else _AllReduce.apply(x, axis, True, True)


def all_gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Concatenate the ranks' slices; backward: sum, and scatter the slices."""
    return x if axis.size == 1 else _AllGather.apply(x, dim % x.ndim, axis, True)


def all_gather_replicated(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Concatenate the ranks' slices; backward: the own slice of a gradient that all ranks hold."""
    return x if axis.size == 1 else _AllGather.apply(x, dim % x.ndim, axis, False)


def reduce_scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """Sum over the ranks and keep the own slice; backward: gather the slices."""
    return x if axis.size == 1 else _ReduceScatter.apply(x, dim % x.ndim, axis)


def split(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """The own slice of a value that all ranks hold; backward: gather the slices."""
    return x if axis.size == 1 else _Split.apply(x, dim % x.ndim, axis)


def narrow(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """The own slice; backward: zeros elsewhere, so the gradient is a partial sum."""
    if axis.size == 1:
        return x
    slice_size = _slice_size(x, dim, axis)
    return x.narrow(dim, axis.rank * slice_size, slice_size)


def all_to_all(x: Tensor, split_dim: int, concat_dim: int, axis: Axis) -> Tensor:
    """Give each rank a slice of split_dim, join theirs along concat_dim; backward: the inverse."""
    if axis.size == 1:
        return x
    return _AllToAll.apply(x, split_dim % x.ndim, concat_dim % x.ndim, axis)


def chunk_bounds(size: int, axis: Axis) -> tuple[int, int]:
    """(start, stop) of the rank's part as torch.chunk cuts: equal parts, the last ones shorter."""
    chunk = -(-size // axis.size)
    return min(axis.rank * chunk, size), min((axis.rank + 1) * chunk, size)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, forward_sums: bool, backward_sums: bool) -> Tensor:
        ctx.axis, ctx.sums = axis, backward_sums
        return _sum(x, axis) if forward_sums else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return (_sum(gradient, ctx.axis) if ctx.sums else gradient), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis, backward_sums: bool) -> Tensor:
        ctx.dim, ctx.axis, ctx.sums = dim, axis, backward_sums
        return _gather(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        own = _scatter if ctx.sums else _slice
        return own(gradient, ctx.dim, ctx.axis), None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _scatter(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _gather(gradient, ctx.dim, ctx.axis), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return _slice(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _gather(gradient, ctx.dim, ctx.axis), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split_dim: int, concat_dim: int, axis: Axis) -> Tensor:
        ctx.split_dim, ctx.concat_dim, ctx.axis = split_dim, concat_dim, axis
        return _exchange(x, split_dim, concat_dim, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _exchange(gradient, ctx.concat_dim, ctx.split_dim, ctx.axis), None, None, None


def _sum(x: Tensor, axis: Axis) -> Tensor:
    # a copy: others may still read x, and dist.all_reduce works in place
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=axis.group)
    return out


# torch 2.13 has these under new names, and warns of the old ones
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_gather_(ranks_first: Tensor, x: Tensor, axis: Axis) -> None:
    """Fill [n, *x.shape], contiguous, with every rank's x. Not differentiable."""
    _all_gather(ranks_first.flatten(0, 1), x.contiguous(), group=axis.group)


def reduce_scatter_(out: Tensor, ranks_first: Tensor, axis: Axis) -> None:
    """Fill `out` with the sum of what the ranks hold for this one. Not differentiable."""
    _reduce_scatter(out, ranks_first.flatten(0, 1), group=axis.group)


def _gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    ranks_first = x.new_empty((axis.size, *x.shape))
    all_gather_(ranks_first, x, axis)
    return _concatenate(ranks_first, dim)


def _scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    ranks_first = _ranks_first(x, dim, axis)
    out = x.new_empty(ranks_first.shape[1:])
    reduce_scatter_(out, ranks_first, axis)
    return out


def _exchange(x: Tensor, split_dim: int, concat_dim: int, axis: Axis) -> Tensor:
    ranks_first = _ranks_first(x, split_dim, axis)
    out = torch.empty_like(ranks_first)
    dist.all_to_all_single(out, ranks_first, group=axis.group)
    return _concatenate(out, concat_dim)


def _slice(x: Tensor, dim: int, axis: Axis) -> Tensor:
    slice_size = _slice_size(x, dim, axis)
    # contiguous: a view would keep the whole value alive
    return x.narrow(dim, axis.rank * slice_size, slice_size).contiguous()


def _slice_size(x: Tensor, dim: int, axis: Axis) -> int:
    size = x.shape[dim]
    assert size % axis.size == 0, (
        f"dim {dim} of {tuple(x.shape)} does not split over {axis.size} {axis.name} ranks"
    )
    return size // axis.size


def _ranks_first(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """[.., n * s, ..] -> contiguous [n, .., s, ..]; no copy if dim is 0."""
    parts = x.unflatten(dim, (axis.size, _slice_size(x, dim, axis)))
    return parts.movedim(dim, 0).contiguous()


def _concatenate(ranks_first: Tensor, dim: int) -> Tensor:
    """[n, .., s, ..] -> contiguous [.., n * s, ..]; no copy if dim is 0."""
    return ranks_first.movedim(0, dim).flatten(dim, dim + 1).contiguous()
