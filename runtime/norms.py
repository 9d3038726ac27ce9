"""Layer norm and RMS norm over the last dim: float32 inside for shorter types, x's type outside.

B batch  T tokens  D width
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def layer_norm(x_BTD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Tensor:
    wide = _wide(x_BTD.dtype)
    if x_BTD.dtype != wide and not _fused(x_BTD, weight_D):
        # the CPU's kernel sums bfloat16 gradients in bfloat16, and no kernel mixes types
        return _LayerNorm.apply(x_BTD, weight_D, bias_D, eps)
    return F.layer_norm(x_BTD, weight_D.shape, weight_D, bias_D, eps)


def rms_norm(x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if _fused(x_BTD, weight_D):
        return F.rms_norm(x_BTD, weight_D.shape, weight_D, eps)
    return _RmsNorm.apply(x_BTD, weight_D, eps)


def _fused(x: Tensor, weight: Tensor) -> bool:
    """On GPUs one kernel reads and writes the short type and is float32 inside."""
    return x.is_cuda and x.dtype == weight.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _widened(x: Tensor, *more: Tensor | None) -> list[Any]:
    """All in the wide type of the first."""
    wide = _wide(x.dtype)
    return [None if one is None else one.to(wide) for one in (x, *more)]


class _LayerNorm(torch.autograd.Function):
    """In the wide type, of which nothing is saved but two numbers a row."""

    @staticmethod
    def forward(
        ctx: Any, x_BTD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float
    ) -> Tensor:
        x, weight, bias = _widened(x_BTD, weight_D, bias_D)
        out_BTD, *statistics = torch.native_layer_norm(x, weight_D.shape, weight, bias, eps)
        ctx.save_for_backward(x_BTD, weight_D, bias_D, *statistics)
        return out_BTD.to(x_BTD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
        *saved, mean_BT1, scale_BT1 = ctx.saved_tensors
        x, weight, bias, grad = _widened(*saved, grad_BTD)
        found = torch.ops.aten.native_layer_norm_backward(
            grad, x, saved[1].shape, mean_BT1, scale_BT1, weight, bias, ctx.needs_input_grad[:3]
        )
        pairs = zip(found, saved, strict=True)
        return *(None if g is None else g.to(s.dtype) for g, s in pairs), None


class _RmsNorm(torch.autograd.Function):
    """On CPUs F.rms_norm is a chain of operators that saves two copies of x; this saves x alone."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = _wide(x_BTD.dtype)
        x = x_BTD.to(wide)
        squares_BT1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale_BT1 = squares_BT1.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_BTD, weight_D, scale_BT1)
        return (x * scale_BT1).mul_(weight_D).to(x_BTD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_BTD, weight_D, scale_BT1 = ctx.saved_tensors
        grad = grad_BTD.to(scale_BT1.dtype)
        unit = x_BTD * scale_BT1  # promotes to the wide type
        grad_weight = grad_x = None
        if ctx.needs_input_grad[1]:
            rows_ND = (grad * unit).flatten(0, -2)
            grad_weight = rows_ND.sum(0).to(weight_D.dtype)
        if ctx.needs_input_grad[0]:
            inner = grad * weight_D
            along_BT1 = torch.linalg.vecdot(inner, unit).unsqueeze_(-1).div_(-unit.shape[-1])
            grad_x = inner.addcmul_(unit, along_BT1).mul_(scale_BT1).to(x_BTD.dtype)
        return grad_x, grad_weight, None
