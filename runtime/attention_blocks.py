"""Attention of some queries to some keys, in pieces whose results are merged.

A piece gives its result and the logarithm of its softmax's denominator; the backward of a piece
needs the whole softmax's result and logarithm alone (Dao 2023, FlashAttention-2, 3.1).

B batch  T queries  S keys  H query heads  K key/value heads  G query heads of each  E head width
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SCORES_BYTES = 64 * 2**20  # of scores at once where they are written out


class Block(NamedTuple):
    """queries, keys: slices of the tokens at hand. offset: where the first query stands, seen from
    the first key. causal, window: as in `attention`, and off where the block is not cut by them."""

    queries: slice
    keys: slice
    offset: int
    causal: bool
    window: int | None


def visible(
    queries: slice, keys: slice, offset: int, causal: bool, window: int | None
) -> Block | None:
    """The block, its mask left out where all is seen; None where nothing is."""
    # distances back from a query to a key, the farthest and the nearest
    far, near = offset + queries.stop - queries.start - 1, offset - (keys.stop - keys.start - 1)
    if causal and far < 0:
        return None
    if window is not None and (near >= window or (not causal and -far >= window)):
        return None
    if window is not None and far < window and -near < window:
        window = None
    return Block(queries, keys, offset, causal and near < 0, window)


def forward(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, block: Block, explicit: bool
) -> tuple[Tensor, Tensor]:
    """(out [B, H, T, E], logarithms [B, H, T] in float32 at least); 0 and -inf for a query that
    sees no key of the block."""
    if explicit or not _has_kernel(q_BHTE, block):
        return _forward_written_out(q_BHTE, k_BKSE, v_BKSE, block)
    if q_BHTE.device.type == "cpu":
        cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return cpu(q_BHTE, k_BKSE, v_BKSE, 0.0, block.causal)
    cuda = torch.ops.aten._scaled_dot_product_flash_attention
    return cuda(q_BHTE, k_BKSE, v_BKSE, 0.0, block.causal)[:2]


def backward(
    grad_BHTE: Tensor,
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    out_BHTE: Tensor,
    log_BHT: Tensor,
    block: Block,
    explicit: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The block's part of the gradients of q, k and v; out and log: of the whole softmax."""
    if explicit or not _has_kernel(q_BHTE, block):
        return _backward_written_out(grad_BHTE, q_BHTE, k_BKSE, v_BKSE, out_BHTE, log_BHT, block)
    values = grad_BHTE, q_BHTE, k_BKSE, v_BKSE, out_BHTE, log_BHT
    if q_BHTE.device.type == "cpu":
        cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return cpu(*values, 0.0, block.causal)
    cuda = torch.ops.aten._scaled_dot_product_flash_attention_backward
    state = torch.zeros(2, dtype=torch.int64, device=q_BHTE.device)  # of a dropout that is off
    sizes = q_BHTE.shape[2], k_BKSE.shape[2]
    return cuda(*values, None, None, *sizes, 0.0, block.causal, state, state)


def _has_kernel(q_BHTE: Tensor, block: Block) -> bool:
    plain = block.window is None and (not block.causal or block.offset == 0)
    if q_BHTE.device.type == "cpu":
        return plain
    width = q_BHTE.shape[3]
    half = q_BHTE.dtype in (torch.bfloat16, torch.float16)
    return plain and half and width % 8 == 0 and width <= 256


def _rows(q_BHTE: Tensor, k_BKSE: Tensor, block: Block) -> Iterator[tuple[slice, slice, Tensor]]:
    """(queries, keys that any of them sees, who sees which): bounded pieces of the block."""
    batch, heads, queries = q_BHTE.shape[:3]
    keys, device = k_BKSE.shape[2], q_BHTE.device
    wide = torch.promote_types(q_BHTE.dtype, torch.float32)
    step = max(1, SCORES_BYTES // (batch * heads * keys * wide.itemsize))
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        first, last = 0, keys
        if block.causal:
            last = min(last, stop + block.offset)
        if block.window is not None:
            first = max(first, start + block.offset - block.window + 1)
            if not block.causal:
                last = min(last, stop - 1 + block.offset + block.window)
        if first >= last:
            continue
        t_T1 = torch.arange(start, stop, device=device)[:, None] + block.offset
        s_S = torch.arange(first, last, device=device)
        seen_TS = torch.ones(stop - start, last - first, dtype=torch.bool, device=device)
        if block.causal:
            seen_TS &= s_S <= t_T1
        if block.window is not None:
            seen_TS &= (t_T1 - s_S).abs() < block.window
        yield slice(start, stop), slice(first, last), seen_TS


def _grouped(x_BHTE: Tensor, k_BKSE: Tensor) -> Tensor:
    """[B, K, G, ..]: the query heads of each key/value head."""
    return x_BHTE.unflatten(1, (k_BKSE.shape[1], -1))


def _scores(q_BKGTE: Tensor, k_BKSE: Tensor, seen_TS: Tensor) -> Tensor:
    wide = torch.promote_types(q_BKGTE.dtype, torch.float32)
    scale = q_BKGTE.shape[-1] ** -0.5
    scores_BKGTS = ((q_BKGTE * scale) @ k_BKSE[:, :, None].transpose(-1, -2)).to(wide)
    return scores_BKGTS.masked_fill_(~seen_TS, float("-inf"))


def _forward_written_out(
    q_BHTE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, block: Block
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_BHTE.dtype, torch.float32)
    out_BHTE = torch.zeros_like(q_BHTE)
    log_BHT = q_BHTE.new_full(q_BHTE.shape[:3], float("-inf"), dtype=wide)
    q_BKGTE = _grouped(q_BHTE, k_BKSE)
    for rows, keys, seen_TS in _rows(q_BHTE, k_BKSE, block):
        scores = _scores(q_BKGTE[..., rows, :], k_BKSE[:, :, keys], seen_TS)
        log = scores.logsumexp(-1)
        # a query that sees nothing here has weights exp(-inf - 0)
        weights = (scores - log.masked_fill(log.isinf(), 0.0)[..., None]).exp_().to(q_BHTE.dtype)
        out_BHTE[:, :, rows] = (weights @ v_BKSE[:, :, None, keys]).flatten(1, 2)
        log_BHT[:, :, rows] = log.flatten(1, 2)
    return out_BHTE, log_BHT


def _backward_written_out(
    grad_BHTE: Tensor,
    q_BHTE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    out_BHTE: Tensor,
    log_BHT: Tensor,
    block: Block,
) -> tuple[Tensor, Tensor, Tensor]:
    scale, kind = q_BHTE.shape[-1] ** -0.5, q_BHTE.dtype
    dq_BHTE, dk_BKSE = torch.zeros_like(q_BHTE), torch.zeros_like(k_BKSE, dtype=log_BHT.dtype)
    dv_BKSE = torch.zeros_like(dk_BKSE)
    whole = (grad_BHTE.to(log_BHT.dtype) * out_BHTE).sum(-1, keepdim=True)
    parts = (_grouped(x, k_BKSE) for x in (q_BHTE, grad_BHTE, whole, log_BHT[..., None]))
    q, grad, whole, log = parts  # each [B, K, G, T, ..]
    for rows, keys, seen_TS in _rows(q_BHTE, k_BKSE, block):
        k, v = k_BKSE[:, :, keys], v_BKSE[:, :, keys]
        weights = (_scores(q[..., rows, :], k, seen_TS) - log[..., rows, :]).exp_()
        d_weights = (grad[..., rows, :] @ v[:, :, None].transpose(-1, -2)).to(weights.dtype)
        d_scores = (d_weights - whole[..., rows, :]).mul_(weights).mul_(scale).to(kind)
        weights = weights.to(kind)
        dq_BHTE[:, :, rows] = (d_scores @ k[:, :, None]).flatten(1, 2)
        dk_BKSE[:, :, keys] += (d_scores.transpose(-1, -2) @ q[..., rows, :]).sum(2)
        dv_BKSE[:, :, keys] += (weights.transpose(-1, -2) @ grad[..., rows, :]).sum(2)
    return dq_BHTE, dk_BKSE, dv_BKSE
