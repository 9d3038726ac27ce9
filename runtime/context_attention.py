"""Attention whose tokens are spread over context ranks, in the order of context.py.

ring     keys and values go round, one neighbour at a time, while the block at hand is computed
gather   every rank gathers all keys and values, and forgets them again until the backward
ulysses  ranks exchange tokens for heads, attend to the whole sequence, and exchange back

Source: Liu, Zaharia and Abbeel 2023 (ring), with Brandon et al. 2023's balanced order; Jacobs et
al. 2023 (DeepSpeed-Ulysses).

B batch  t this rank's tokens  H query heads  K key/value heads  E head width
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import attention_blocks
from .attention import attention, explicit_attention
from .attention_blocks import Block, visible
from .collectives import all_gather_, reduce_scatter_
from .context import heads_to_tokens, tokens_to_heads
from .mesh import Axis


def ring_attention(
    q_BtHE: Tensor,
    k_BtKE: Tensor,
    v_BtKE: Tensor,
    axis: Axis,
    *,
    causal: bool,
    window: int | None = None,
    explicit: bool = False,
) -> Tensor:
    """Returns [B, t, H, E]. Keeps q, k, v, the result and a number a row.

    Forward: c - 1 messages of k and v; backward: those again, and c of their gradients.
    explicit: scores are written out, block by block, instead of a kernel.
    """
    if axis.size == 1:
        return _on_one(q_BtHE, k_BtKE, v_BtKE, causal, window, explicit)
    return _spread(q_BtHE, k_BtKE, v_BtKE, axis, causal, window, explicit, True)


def gather_attention(
    q_BtHE: Tensor,
    k_BtKE: Tensor,
    v_BtKE: Tensor,
    axis: Axis,
    *,
    causal: bool,
    window: int | None = None,
    explicit: bool = False,
) -> Tensor:
    """`ring_attention` with one all-gather of k and v forward, one more and a reduce-scatter of
    their gradients backward."""
    if axis.size == 1:
        return _on_one(q_BtHE, k_BtKE, v_BtKE, causal, window, explicit)
    return _spread(q_BtHE, k_BtKE, v_BtKE, axis, causal, window, explicit, False)


def ulysses_attention(
    q_BtHE: Tensor,
    k_BtKE: Tensor,
    v_BtKE: Tensor,
    axis: Axis,
    *,
    causal: bool,
    window: int | None = None,
    explicit: bool = False,
) -> Tensor:
    """Returns [B, t, H, E]; H must be a multiple of the ranks.

    Key/value heads that the ranks do not divide are repeated until they do; the backward sums the
    copies' gradients.
    """
    repeat = math.lcm(k_BtKE.shape[2], axis.size) // k_BtKE.shape[2]
    if repeat > 1:
        k_BtKE, v_BtKE = (x.repeat_interleave(repeat, 2) for x in (k_BtKE, v_BtKE))
    q_BThE, k_BTkE, v_BTkE = (tokens_to_heads(x, axis) for x in (q_BtHE, k_BtKE, v_BtKE))
    return heads_to_tokens(_on_one(q_BThE, k_BTkE, v_BTkE, causal, window, explicit), axis)


def _on_one(
    q_BTHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    causal: bool,
    window: int | None,
    explicit: bool,
) -> Tensor:
    compute = explicit_attention if explicit else attention
    return compute(q_BTHE, k_BTKE, v_BTKE, causal, window)


def _spread(q_BtHE: Tensor, k_BtKE: Tensor, v_BtKE: Tensor, *how: Any) -> Tensor:
    """Keys and values travel as one, so heads of another width are filled up with zeros."""
    width, values = q_BtHE.shape[3], v_BtKE.shape[3]
    if values > width:  # and the softmax is scaled by the width at hand
        q_BtHE = F.pad(q_BtHE * (values / width) ** 0.5, (0, values - width))
        k_BtKE = F.pad(k_BtKE, (0, values - width))
    elif values < width:
        v_BtKE = F.pad(v_BtKE, (0, width - values))
    out_BtHE = _Spread.apply(q_BtHE, k_BtKE, v_BtKE, *how)
    return out_BtHE[..., :values] if values < width else out_BtHE


def blocks(
    rank: int, source: int, ranks: int, tokens: int, causal: bool, window: int | None
) -> list[Block]:
    """How `rank`'s tokens see those of `source`; both hold two chunks of tokens / 2."""
    half = tokens // 2
    low, high, both = slice(0, half), slice(half, tokens), slice(0, tokens)
    if window is None:
        if not causal:
            return [Block(both, both, 0, False, None)]
        if source == rank:  # chunks stand in order, so one triangle is the mask of both
            return [Block(both, both, 0, True, None)]
        if source < rank:
            return [Block(both, low, 0, False, None)]
        return [Block(high, both, 0, False, None)]
    far = 2 * ranks - 1
    found = [
        visible(queries, keys, (a - b) * half, causal, window)
        for queries, a in ((low, rank), (high, far - rank))
        for keys, b in ((low, source), (high, far - source))
    ]
    return [block for block in found if block is not None]


class _Spread(torch.autograd.Function):
    """Ring and gather: the same blocks, brought by different roads."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BtHE: Tensor,
        k_BtKE: Tensor,
        v_BtKE: Tensor,
        axis: Axis,
        causal: bool,
        window: int | None,
        explicit: bool,
        ring: bool,
    ) -> Tensor:
        ctx.axis, ctx.mask, ctx.explicit, ctx.ring = axis, (causal, window), explicit, ring
        q_BHtE = q_BtHE.transpose(1, 2)
        wide = torch.promote_types(q_BHtE.dtype, torch.float32)
        out_BHtE = torch.zeros_like(q_BHtE, dtype=wide)
        log_BHt = torch.full(q_BHtE.shape[:3], float("-inf"), dtype=wide, device=q_BHtE.device)
        own = torch.stack((k_BtKE, v_BtKE))
        for source, kv in _around(own, axis) if ring else _gathered(own, axis):
            k_BKtE, v_BKtE = kv.transpose(2, 3)
            for block in blocks(axis.rank, source, axis.size, q_BtHE.shape[1], causal, window):
                t, s = block.queries, block.keys
                part = attention_blocks.forward(
                    q_BHtE[:, :, t], k_BKtE[:, :, s], v_BKtE[:, :, s], block, explicit
                )
                _merge(out_BHtE[:, :, t], log_BHt[:, :, t], *part)
        out_BtHE = out_BHtE.transpose(1, 2).to(q_BtHE.dtype)
        ctx.save_for_backward(q_BtHE, k_BtKE, v_BtKE, out_BtHE, log_BHt)
        return out_BtHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BtHE: Tensor) -> Any:
        q_BtHE, k_BtKE, v_BtKE, out_BtHE, log_BHt = ctx.saved_tensors
        axis, tokens = ctx.axis, q_BtHE.shape[1]
        q, out, grad = (x.transpose(1, 2) for x in (q_BtHE, out_BtHE, grad_BtHE.contiguous()))
        dq_BHtE = torch.zeros_like(q, dtype=log_BHt.dtype)
        own = torch.stack((k_BtKE, v_BtKE))
        sums = _RingSums(axis) if ctx.ring else _GatheredSums(axis)
        for source, kv in _around(own, axis) if ctx.ring else _gathered(own, axis):
            found = blocks(axis.rank, source, axis.size, tokens, *ctx.mask)
            sums.add(
                source, _backward(grad, q, kv, out, log_BHt, found, ctx.explicit, into=dq_BHtE)
            )
        del kv  # with it all ranks' keys and values, before their gradients are scattered
        dk, dv = sums.home().to(k_BtKE.dtype)
        return dq_BHtE.transpose(1, 2).to(q_BtHE.dtype), dk, dv, *[None] * 5


def _backward(
    grad_BHtE: Tensor,
    q_BHtE: Tensor,
    kv: Tensor,
    out_BHtE: Tensor,
    log_BHt: Tensor,
    found: list[Block],
    explicit: bool,
    *,
    into: Tensor,
) -> Tensor:
    """Gradients of one rank's k and v, stacked as they are; q's are added to `into`."""
    k_BKtE, v_BKtE = kv.transpose(2, 3)
    dkv = torch.zeros_like(kv, dtype=log_BHt.dtype)
    dk_BKtE, dv_BKtE = dkv.transpose(2, 3)
    for block in found:
        t, s = block.queries, block.keys
        part = attention_blocks.backward(
            grad_BHtE[:, :, t],
            q_BHtE[:, :, t],
            k_BKtE[:, :, s],
            v_BKtE[:, :, s],
            out_BHtE[:, :, t],
            log_BHt[:, :, t],
            block,
            explicit,
        )
        into[:, :, t] += part[0]
        dk_BKtE[:, :, s] += part[1]
        dv_BKtE[:, :, s] += part[2]
    return dkv


def _merge(out_BHTE: Tensor, log_BHT: Tensor, part_BHTE: Tensor, part_log_BHT: Tensor) -> None:
    """Take one more block into a running softmax, in place."""
    total_BHT = torch.logaddexp(log_BHT, part_log_BHT)
    # what no key has reached yet stays 0 and -inf
    known_BHT = total_BHT.masked_fill(total_BHT.isinf(), 0.0)
    out_BHTE.mul_((log_BHT - known_BHT).exp_()[..., None])
    out_BHTE.addcmul_(part_BHTE.to(out_BHTE.dtype), (part_log_BHT - known_BHT).exp_()[..., None])
    log_BHT.copy_(total_BHT)


# --------------------------------------------------------------------------------------------------
# Roads


class _Arrival:
    """A message on its way from the rank before, while one goes to the rank after."""

    def __init__(self, x: Tensor, axis: Axis):
        self.sent, self.buffer = x.contiguous(), torch.empty_like(x)
        to, source = (
            dist.get_global_rank(axis.group, (axis.rank + step) % axis.size) for step in (1, -1)
        )
        self.work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self.sent, to, axis.group),
                dist.P2POp(dist.irecv, self.buffer, source, axis.group),
            ]
        )

    def wait(self) -> Tensor:
        for work in self.work:
            work.wait()
        return self.buffer


def _around(kv: Tensor, axis: Axis) -> Iterator[tuple[int, Tensor]]:
    """(rank, its keys and values), the own first; the next travel while these are used."""
    for step in range(axis.size):
        arriving = _Arrival(kv, axis) if step < axis.size - 1 else None
        yield (axis.rank - step) % axis.size, kv
        if arriving is not None:
            kv = arriving.wait()


def _gathered(kv: Tensor, axis: Axis) -> Iterator[tuple[int, Tensor]]:
    """The same from one all-gather."""
    every = kv.new_empty((axis.size, *kv.shape))
    all_gather_(every, kv, axis)
    for step in range(axis.size):
        source = (axis.rank - step) % axis.size
        yield source, every[source]


class _RingSums:
    """Gradients that follow their keys and values round the ring, one step behind."""

    def __init__(self, axis: Axis):
        self.axis = axis
        self.arriving: _Arrival | None = None

    def add(self, source: int, dkv: Tensor) -> None:
        if self.arriving is not None:
            dkv += self.arriving.wait()
        self.arriving = _Arrival(dkv, self.axis)

    def home(self) -> Tensor:
        assert self.arriving is not None, "every rank has added its part"
        return self.arriving.wait()


class _GatheredSums:
    """Gradients of all ranks' keys and values, summed and scattered at the end."""

    def __init__(self, axis: Axis):
        self.axis = axis
        self.every: Tensor | None = None

    def add(self, source: int, dkv: Tensor) -> None:
        if self.every is None:
            self.every = dkv.new_empty((self.axis.size, *dkv.shape))
        self.every[source] = dkv

    def home(self) -> Tensor:
        assert self.every is not None, "every rank has added its part"
        out = torch.empty_like(self.every[0])
        reduce_scatter_(out, self.every, self.axis)
        self.every = None
        return out
