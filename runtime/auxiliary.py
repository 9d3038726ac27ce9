"""Losses of layers inside the model: their gradients join the token loss's where they arise.

Like the loss itself they are sums over tokens, so the step divides both by the same number. Neither
the chain of blocks nor a pipeline carries them: `set_scale` says once a step what a unit counts.
"""

from typing import Any

import torch
from torch import Tensor


class _Scale:
    """The gradient that the sum of all losses has in this step."""

    value = 1.0


def set_scale(scale: float) -> None:
    """scale: what the summed loss is multiplied with before its backward: 1 / target tokens."""
    _Scale.value = scale


def with_loss(x: Tensor, loss: Tensor) -> Tensor:
    """x as it is; the backward starts at `loss` (a sum over tokens) too."""
    return _WithLoss.apply(x, loss)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return gradient, torch.full((), _Scale.value, dtype=dtype, device=device)
