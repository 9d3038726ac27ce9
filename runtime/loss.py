"""Cross entropy and embedding, over a whole vocabulary or one that is split over tensor ranks.

B batch  T tokens  N = B * T rows  V vocabulary  v this rank's part of it  D width
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .collectives import chunk_bounds

if TYPE_CHECKING:
    from .mesh import Axis

IGNORED = -100  # a target that counts for nothing
CHUNK_BYTES = 32 * 2**20  # of a float32 copy of logits: small enough for a GPU's cache, nearly


def cross_entropy_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """The sum over all targets; the softmax is in float32 (float64 for float64 logits)."""
    if logits_BTV.dtype in (torch.float32, torch.float64):
        return F.cross_entropy(
            logits_BTV.flatten(0, -2),
            targets_BT.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        )
    return _CrossEntropySum.apply(logits_BTV, targets_BT, 0, None)


def vocabulary_parallel_cross_entropy_sum(
    logits_BTv: Tensor, targets_BT: Tensor, whole_vocab: int, axis: "Axis"
) -> Tensor:
    """`cross_entropy_sum` of logits split over the axis (uneven: torch.chunk's parts).

    Every rank of the axis returns the whole sum. Two all-reduces of one and two numbers a row.
    """
    if axis.size == 1:
        return cross_entropy_sum(logits_BTv, targets_BT)
    first, stop = chunk_bounds(whole_vocab, axis)
    assert logits_BTv.shape[-1] == stop - first, "the logits are not this rank's vocabulary"
    return _CrossEntropySum.apply(logits_BTv, targets_BT, first, axis)


def vocabulary_parallel_embedding(
    ids_BT: Tensor, table_vD: Tensor, whole_vocab: int, axis: "Axis"
) -> Tensor:
    """Rows of the table split over the axis; zeros for ids of other ranks: sum the results."""
    if axis.size == 1:
        return F.embedding(ids_BT, table_vD)
    first, stop = chunk_bounds(whole_vocab, axis)
    if first == stop:  # more ranks than rows: nothing here, and a gradient of no elements
        return table_vD.new_zeros(*ids_BT.shape, table_vD.shape[1]) + table_vD.sum()
    foreign_BT = (ids_BT < first) | (ids_BT >= stop)
    local_BT = (ids_BT - first).masked_fill_(foreign_BT, 0)
    return F.embedding(local_BT, table_vD).masked_fill(foreign_BT[..., None], 0.0)


class _CrossEntropySum(torch.autograd.Function):
    """Saves the logits as they came and one number a row; works through bounded chunks of rows."""

    @staticmethod
    def forward(
        ctx: Any, logits_BTv: Tensor, targets_BT: Tensor, first: int, axis: "Axis | None"
    ) -> Tensor:
        logits_Nv = logits_BTv.flatten(0, -2)
        target_N, counted_N, mine_N = locate(targets_BT.flatten(), first, logits_Nv.shape[1])
        log_sum_N, at_target_N = log_sums(logits_Nv, target_N, mine_N, axis)
        loss = (log_sum_N - at_target_N).where(counted_N, 0.0).sum()
        ctx.save_for_backward(logits_BTv, target_N, counted_N, mine_N, log_sum_N)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits_BTv, target_N, counted_N, mine_N, log_sum_N = ctx.saved_tensors
        logits_Nv = logits_BTv.flatten(0, -2)
        grad_Nv = torch.empty_like(logits_Nv, memory_format=torch.contiguous_format)
        grad_N = grad.to(log_sum_N.dtype).where(counted_N, 0.0)
        for rows in row_chunks(logits_Nv):
            share = (logits_Nv[rows] - log_sum_N[rows, None]).exp_()
            torch.mul(share, grad_N[rows, None], out=grad_Nv[rows])
        if grad_Nv.shape[1] > 0:
            at_target = logits_Nv.gather(1, target_N[:, None])[:, 0] - log_sum_N
            at_target = (at_target.exp_() - mine_N.to(at_target.dtype)) * grad_N
            grad_Nv.scatter_(1, target_N[:, None], at_target[:, None].to(grad_Nv.dtype))
        return grad_Nv.view(logits_BTv.shape), None, None, None


def log_sums(
    logits_Nv: Tensor, target_N: Tensor, mine_N: Tensor, axis: "Axis | None"
) -> tuple[Tensor, Tensor]:
    """Of each row the logarithm of its summed exponentials, and the logit of its target: over the
    vocabulary of all ranks, in float32 at least."""
    wide = torch.promote_types(logits_Nv.dtype, torch.float32)
    log_sum_N = torch.empty(len(logits_Nv), dtype=wide, device=logits_Nv.device)
    if logits_Nv.shape[1] == 0:
        log_sum_N.fill_(float("-inf"))
        at_target_N = torch.zeros_like(log_sum_N)
    else:
        for rows in row_chunks(logits_Nv):
            # one fused kernel; any of its results gives the sum away
            torch.sub(
                logits_Nv[rows, 0],
                torch.log_softmax(logits_Nv[rows], dim=1, dtype=wide)[:, 0],
                out=log_sum_N[rows],
            )
        at_target_N = logits_Nv.gather(1, target_N[:, None])[:, 0].to(wide).where(mine_N, 0.0)
    if axis is not None:
        top_N = log_sum_N.clone()
        dist.all_reduce(top_N, dist.ReduceOp.MAX, group=axis.group)
        sums_2N = torch.stack(((log_sum_N - top_N).exp_(), at_target_N))
        dist.all_reduce(sums_2N, group=axis.group)
        log_sum_N, at_target_N = sums_2N[0].log().add_(top_N), sums_2N[1]
    return log_sum_N, at_target_N


def locate(targets_N: Tensor, first: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The column of each target here (0 where it is not), whether it counts, whether it is here."""
    counted_N = targets_N != IGNORED
    mine_N = (targets_N >= first) & (targets_N < first + width)
    return (targets_N - first).where(mine_N, 0), counted_N, mine_N


def row_chunks(logits_Nv: Tensor) -> list[slice]:
    """Rows whose float32 copy takes CHUNK_BYTES."""
    count, width = logits_Nv.shape
    wide = torch.promote_types(logits_Nv.dtype, torch.float32)
    step = max(1, CHUNK_BYTES // max(1, width * wide.itemsize))
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
