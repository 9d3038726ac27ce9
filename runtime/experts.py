"""Rows to experts and back, and the products between: a stack of weights, a product for each.

B sequences  T tokens  D width  X experts  P picks of a token  R rows: picks that are kept
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def dispatch(x_BTD: Tensor, order_R: Tensor, top_k: int) -> Tensor:
    """The token of each pick, by expert [R, D]."""
    return _Gather.apply(x_BTD.flatten(0, 1), order_R, top_k)


def grouped_linear(rows_RI: Tensor, weight_XOI: Tensor, counts_X: Tensor) -> Tensor:
    """Each row times the weight of its expert [R, O]; the first counts_X[0] rows are expert 0's."""
    return _GroupedLinear.apply(rows_RI, weight_XOI, counts_X)


def grouped_bias(rows_RO: Tensor, bias_XO: Tensor, counts_X: Tensor) -> Tensor:
    """Each row plus the bias of its expert [R, O]."""
    number_R = torch.repeat_interleave(counts_X, output_size=rows_RO.shape[0])
    return rows_RO + F.embedding(number_R, bias_XO)


def combine(rows_RD: Tensor, weights_BTP: Tensor, order_R: Tensor) -> Tensor:
    """The weighted sum of each token's rows [B, T, D]; what was dropped adds nothing."""
    picks_ND = _Spread.apply(rows_RD, order_R, weights_BTP.numel())
    picks_NPD = picks_ND.unflatten(0, (-1, weights_BTP.shape[2]))
    weights_N1P = weights_BTP.to(rows_RD.dtype).flatten(0, 1).unsqueeze(1)
    return (weights_N1P @ picks_NPD).squeeze(1).unflatten(0, weights_BTP.shape[:2])


def _spread(rows_RD: Tensor, order_R: Tensor, places: int) -> Tensor:
    """Rows to the places of their picks [places, D], zeros where a pick was dropped."""
    whole = rows_RD.shape[0] == places
    out_ND = (rows_RD.new_empty if whole else rows_RD.new_zeros)(places, rows_RD.shape[1])
    return out_ND.index_copy_(0, order_R, rows_RD)


class _Gather(torch.autograd.Function):
    """x[order // top_k]; the backward sums a token's picks in their order, alike in every run."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.top_k, ctx.tokens = top_k, x_ND.shape[0]
        return x_ND.index_select(0, order_R // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None, None]:
        (order_R,) = ctx.saved_tensors
        picks_ND = _spread(gradient_RD, order_R, ctx.tokens * ctx.top_k)
        return picks_ND.unflatten(0, (-1, ctx.top_k)).sum(1), None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, order_R: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(order_R)
        return _spread(rows_RD, order_R, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None, None]:
        (order_R,) = ctx.saved_tensors
        return gradient_ND.index_select(0, order_R), None, None


class _GroupedLinear(torch.autograd.Function):
    """One grouped kernel in bfloat16 on GPUs; else a loop over the experts."""

    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, weight_XOI: Tensor, counts_X: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RI, weight_XOI, counts_X)
        return _product(rows_RI, weight_XOI.transpose(1, 2), counts_X)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows_RI, weight_XOI, counts_X = ctx.saved_tensors
        grad_rows = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_rows = _product(gradient_RO, weight_XOI, counts_X)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(gradient_RO, rows_RI, counts_X, weight_XOI)
        return grad_rows, grad_weight, None


def _one_kernel(rows: Tensor, weight: Tensor) -> bool:
    """What torch._grouped_mm takes: bfloat16, and rows of whole 16 bytes."""
    whole = rows.shape[1] % 8 == 0 and weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
    return rows.is_cuda and rows.dtype == weight.dtype == torch.bfloat16 and whole


def _product(rows_RI: Tensor, weight_XIO: Tensor, counts_X: Tensor) -> Tensor:
    if _one_kernel(rows_RI, weight_XIO):
        ends_X = counts_X.cumsum(0, dtype=torch.int32)
        return torch._grouped_mm(rows_RI.contiguous(), weight_XIO, offs=ends_X)
    out_RO = rows_RI.new_empty(rows_RI.shape[0], weight_XIO.shape[2])
    counts = counts_X.tolist()
    parts = zip(rows_RI.split(counts), out_RO.split(counts), weight_XIO.unbind(), strict=True)
    for rows, out, weight in parts:
        torch.mm(rows, weight, out=out)
    return out_RO


def _weight_gradient(
    gradient_RO: Tensor, rows_RI: Tensor, counts_X: Tensor, weight_XOI: Tensor
) -> Tensor:
    if _one_kernel(gradient_RO, weight_XOI) and rows_RI.dtype == gradient_RO.dtype:
        ends_X = counts_X.cumsum(0, dtype=torch.int32)
        return torch._grouped_mm(gradient_RO.contiguous().T, rows_RI.contiguous(), offs=ends_X)
    out_XOI = torch.empty_like(weight_XOI, memory_format=torch.contiguous_format)
    counts = counts_X.tolist()
    parts = zip(gradient_RO.split(counts), rows_RI.split(counts), out_XOI.unbind(), strict=True)
    for gradient, rows, out in parts:
        torch.mm(gradient.T, rows, out=out)
    return out_XOI
