"""A model's last product and its cross entropy as one: all logits are never there at once.

Rows go through in chunks: their logits are made, turned into the gradient of their loss where they
lie, and multiplied into the gradients of the hidden states and of the weight, which is all that
waits for the backward. Nothing is computed twice; the backward scales what is there.

N rows (tokens)  R rows of a chunk  V vocabulary  v this rank's part of it  D width
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .collectives import chunk_bounds
from .loss import locate, log_sums, row_chunks

if TYPE_CHECKING:
    from .mesh import Axis

SUMMED_IN_HALF = 1024
"""Rows whose part of the weight's gradient float16 holds: of more of them it is scaled down."""


def linear_cross_entropy_sum(
    x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, *, rows: int
) -> Tensor:
    """`cross_entropy_sum` of x @ weight.T, of so many rows at a time."""
    return _summed(x_BTD, weight_VD, targets_BT, rows, 0, None)


def vocabulary_parallel_linear_cross_entropy_sum(
    x_BTD: Tensor,
    weight_vD: Tensor,
    targets_BT: Tensor,
    whole_vocab: int,
    axis: "Axis",
    *,
    rows: int,
) -> Tensor:
    """The same, the weight's rows split over the axis (uneven: torch.chunk's parts).

    Every rank returns the whole sum; the gradient of x is a term of a sum over the axis. Two
    all-reduces of one and two numbers a row in each chunk.
    """
    if axis.size == 1:
        return linear_cross_entropy_sum(x_BTD, weight_vD, targets_BT, rows=rows)
    first, stop = chunk_bounds(whole_vocab, axis)
    assert weight_vD.shape[0] == stop - first, "the weight is not this rank's vocabulary"
    return _summed(x_BTD, weight_vD, targets_BT, rows, first, axis)


def _summed(
    x_BTD: Tensor,
    weight_vD: Tensor,
    targets_BT: Tensor,
    rows: int,
    first: int,
    axis: "Axis | None",
) -> Tensor:
    if torch.is_grad_enabled() and (x_BTD.requires_grad or weight_vD.requires_grad):
        return _LinearCrossEntropySum.apply(x_BTD, weight_vD, targets_BT, rows, first, axis)
    return _Chunks(x_BTD.flatten(0, -2), weight_vD, targets_BT.flatten(), first, axis).run(rows)


class _LinearCrossEntropySum(torch.autograd.Function):
    """Saves the gradients of x and of the weight, for a loss whose own gradient is 1."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: Tensor,
        weight_vD: Tensor,
        targets_BT: Tensor,
        rows: int,
        first: int,
        axis: "Axis | None",
    ) -> Tensor:
        chunks = _Chunks(x_BTD.flatten(0, -2), weight_vD, targets_BT.flatten(), first, axis)
        of_x, of_weight = ctx.needs_input_grad[:2]
        loss = chunks.run(rows, of_x=of_x, of_weight=of_weight)
        ctx.save_for_backward(chunks.of_x_ND, chunks.of_weight_vD)
        ctx.shape, ctx.scale = x_BTD.shape, chunks.scale
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x_ND, of_weight_vD = ctx.saved_tensors
        # in place: nobody else reads them, and they are read once
        of_x = None if of_x_ND is None else of_x_ND.mul_(grad).view(ctx.shape)
        of_weight = None if of_weight_vD is None else of_weight_vD.mul_(grad / ctx.scale)
        return of_x, of_weight, None, None, None, None


class _Chunks:
    """The loss of some rows, and the gradients that come with it.

    scale: what the weight's gradient is multiplied with: sums over many rows leave float16's range.
    """

    def __init__(
        self,
        x_ND: Tensor,
        weight_vD: Tensor,
        targets_N: Tensor,
        first: int,
        axis: "Axis | None",
    ):
        self.x_ND, self.weight_vD, self.axis = x_ND, weight_vD, axis
        self.target_N, self.counted_N, self.mine_N = locate(targets_N, first, len(weight_vD))
        self.of_x_ND: Tensor | None = None
        self.of_weight_vD: Tensor | None = None
        self.scale = 1.0
        if weight_vD.dtype == torch.float16:
            while len(x_ND) * self.scale > SUMMED_IN_HALF:
                self.scale /= 2

    def run(self, rows: int, *, of_x: bool = False, of_weight: bool = False) -> Tensor:
        """The summed loss; afterwards the gradients that were asked for are there."""
        self.of_x_ND = torch.empty_like(self.x_ND) if of_x else None
        self.of_weight_vD = torch.empty_like(self.weight_vD) if of_weight else None
        wide = torch.promote_types(self.x_ND.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=self.x_ND.device)
        for start in range(0, len(self.x_ND), rows):
            loss += self._chunk(slice(start, start + rows), gradients=of_x or of_weight)
        return loss

    def _chunk(self, rows: slice, *, gradients: bool) -> Tensor:
        """The loss of these rows; their part of the gradients is added."""
        logits_Rv = self.x_ND[rows] @ self.weight_vD.t()
        target_R, mine_R = self.target_N[rows], self.mine_N[rows]
        if gradients and self.axis is None:
            loss_R = _to_softmax(logits_Rv, target_R)
        else:
            log_sum_R, at_target_R = log_sums(logits_Rv, target_R, mine_R, self.axis)
            loss_R = log_sum_R - at_target_R
            if gradients:
                _to_shares(logits_Rv, log_sum_R)
        if gradients:
            _take_targets(logits_Rv, target_R, mine_R, loss_R)
            self._multiply(rows, logits_Rv)
        return loss_R.where(self.counted_N[rows], 0.0).sum()

    def _multiply(self, rows: slice, of_logits_Rv: Tensor) -> None:
        ignored_R1 = ~self.counted_N[rows, None]
        if self.of_x_ND is not None:
            of_x_RD = self.of_x_ND[rows]
            torch.mm(of_logits_Rv, self.weight_vD, out=of_x_RD)
            of_x_RD.masked_fill_(ignored_R1, 0.0)
        if self.of_weight_vD is not None:
            x_RD = self.x_ND[rows].masked_fill(ignored_R1, 0.0)
            if self.scale != 1.0:
                x_RD.mul_(self.scale)
            beta = 0 if rows.start == 0 else 1
            self.of_weight_vD.addmm_(of_logits_Rv.t(), x_RD, beta=beta)


def _to_softmax(logits_RV: Tensor, target_R: Tensor) -> Tensor:
    """Each row's loss; the logits become their softmax, in place."""
    wide = torch.promote_types(logits_RV.dtype, torch.float32)
    loss_R = torch.empty(len(logits_RV), dtype=wide, device=logits_RV.device)
    for rows in row_chunks(logits_RV):
        logs = torch.log_softmax(logits_RV[rows], dim=1, dtype=wide)
        torch.neg(logs.gather(1, target_R[rows, None])[:, 0], out=loss_R[rows])
        torch.exp(logs, out=logits_RV[rows])
        del logs  # before the next ones are made
    return loss_R


def _to_shares(logits_Rv: Tensor, log_sum_R: Tensor) -> None:
    """The logits become this rank's part of their softmax, in place."""
    for rows in row_chunks(logits_Rv):
        torch.exp(logits_Rv[rows] - log_sum_R[rows, None], out=logits_Rv[rows])


def _take_targets(share_Rv: Tensor, target_R: Tensor, mine_R: Tensor, loss_R: Tensor) -> None:
    """Takes 1 from the share of each target, exactly where next to nothing is left of it."""
    if share_Rv.shape[1] == 0:
        return
    at_R1 = target_R[:, None]
    left_R = torch.expm1(-loss_R).to(share_Rv.dtype)
    share_Rv.scatter_(1, at_R1, left_R.where(mine_R, share_Rv.gather(1, at_R1)[:, 0])[:, None])
