"""The order in which context ranks hold a sequence, and what moves tokens between them.

The T tokens are cut into 2 c chunks, and rank r of c holds chunks r and 2 c - 1 - r, one after the
other: causal attention then costs every rank the same, and every token of the first chunk stands
before every token of the second. An axis of size 1 holds all tokens in their own order.

B batch  T tokens  t this rank's tokens, T / c  H heads  h this rank's heads, H / c  E head width
"""

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_gather_, reduce_scatter_
from .mesh import Axis


def token_positions(axis: Axis, count: int, device: Any = "cpu") -> Tensor:
    """Where this rank's `count` tokens stand in the sequence: int64 [count]."""
    chunk = _chunk(count, axis)
    first = torch.arange(chunk, device=device)
    if axis.size == 1:
        return first
    low, high = axis.rank * chunk, (2 * axis.size - 1 - axis.rank) * chunk
    return torch.cat((first + low, first + high))


def hidden_tokens(
    axis: Axis, count: int, keys: int, device: Any, *, causal: bool, window: int | None = None
) -> Tensor:
    """Which of the sequence's `keys` tokens this rank's `count` must not look at: [count, keys]."""
    return hidden_keys(token_positions(axis, count, device), keys, causal=causal, window=window)


def query_places(x_BHTS: Tensor, context: Axis | None = None) -> Tensor:
    """Where queries stand among the keys that they are scored against, the last query at the last
    key: int64 [T]. context: the ranks that share the queries."""
    count, keys = x_BHTS.shape[2:]
    if context is None:
        # a tensor made under a fake-tensor mode is fake: it must not outlive it
        places = _places if type(x_BHTS) is Tensor else _places.__wrapped__
        return places(count, keys, x_BHTS.device)
    return token_positions(context, count, x_BHTS.device)


@lru_cache(maxsize=16)
def _places(count: int, keys: int, device: Any) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(keys - count, keys, device=device)


def hidden_keys(query_T: Tensor, keys: int, *, causal: bool, window: int | None = None) -> Tensor:
    """Which keys a query at each of these places must not look at: [T, keys]."""
    query_T1, key_S = query_T[:, None], torch.arange(keys, device=query_T.device)
    hidden_TS = torch.zeros(len(query_T), keys, dtype=torch.bool, device=query_T.device)
    if causal:
        hidden_TS |= key_S > query_T1
    if window is not None:
        hidden_TS |= (query_T1 - key_S).abs() >= window
    return hidden_TS


def own_tokens(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's part of a value that all ranks hold; backward: zeros elsewhere, so the gradient
    is a partial sum."""
    if axis.size == 1:
        return x
    whole = x.shape[dim]
    assert whole % (2 * axis.size) == 0, (
        f"dim {dim} of {tuple(x.shape)} is no whole number of {2 * axis.size} chunks"
    )
    chunk = whole // (2 * axis.size)
    high = 2 * axis.size - 1 - axis.rank
    return torch.cat(
        (x.narrow(dim, axis.rank * chunk, chunk), x.narrow(dim, high * chunk, chunk)), dim
    )


def gather_tokens(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """All ranks' tokens in the sequence's order; backward: sum, and scatter the tokens."""
    return x if axis.size == 1 else _Gather.apply(x, dim % x.ndim, axis)


def tokens_to_heads(x_BtHE: Tensor, axis: Axis) -> Tensor:
    """Give each rank its heads of all tokens, in the sequence's order: [B, T, h, E]; backward: the
    inverse."""
    return x_BtHE if axis.size == 1 else _Exchange.apply(x_BtHE, axis, True)


def heads_to_tokens(x_BThE: Tensor, axis: Axis) -> Tensor:
    """The inverse of `tokens_to_heads`: [B, t, H, E]."""
    return x_BThE if axis.size == 1 else _Exchange.apply(x_BThE, axis, False)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        ranks_first = x.new_empty((axis.size, *x.shape))
        all_gather_(ranks_first, x, axis)
        return _in_order(ranks_first, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ranks_first = _by_rank(gradient, ctx.dim, ctx.axis)
        out = gradient.new_empty(ranks_first.shape[1:])
        reduce_scatter_(out, ranks_first, ctx.axis)
        return out, None, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, to_heads: bool) -> Tensor:
        ctx.axis, ctx.to_heads = axis, to_heads
        return _exchange(x, axis, to_heads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _exchange(gradient, ctx.axis, not ctx.to_heads), None, None


def _exchange(x: Tensor, axis: Axis, to_heads: bool) -> Tensor:
    if to_heads:
        heads = x.shape[2]
        assert heads % axis.size == 0, (
            f"{heads} heads do not divide over {axis.size} {axis.name} ranks"
        )
        ranks_first = x.unflatten(2, (axis.size, -1)).movedim(2, 0).contiguous()
    else:
        ranks_first = _by_rank(x, 1, axis)
    out = torch.empty_like(ranks_first)
    dist.all_to_all_single(out, ranks_first, group=axis.group)
    del ranks_first  # what follows makes a copy
    return _in_order(out, 1) if to_heads else out.movedim(0, 2).flatten(2, 3)


def _chunk(count: int, axis: Axis) -> int:
    """Tokens of one chunk, of a rank that holds `count`."""
    if axis.size == 1:
        return count
    assert count % 2 == 0, f"a {axis.name} rank holds two equal chunks, not {count} tokens"
    return count // 2


def _in_order(ranks_first: Tensor, dim: int) -> Tensor:
    """[c, .., t, ..], each rank's tokens -> [.., T, ..] in the sequence's order."""
    low, high = ranks_first.chunk(2, dim + 1)
    return torch.cat((*low.unbind(), *reversed(high.unbind())), dim)


def _by_rank(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """The inverse of `_in_order`, contiguous."""
    chunks = x.chunk(2 * axis.size, dim)
    pairs = zip(chunks[: axis.size], reversed(chunks[axis.size :]), strict=True)
    return torch.stack([torch.cat(pair, dim) for pair in pairs]).contiguous()
