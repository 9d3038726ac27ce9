"""Losses of layers inside the model: their gradients join the token loss's where they arise.

Like the loss itself they are sums over tokens, so the step divides both by the same number. Neither
the chain of blocks nor a pipeline carries them: `begin` says once a step what a token counts, and
`parts` what they came to.
"""

from typing import Any

import torch
from torch import Tensor

from .mesh import Axis


class _Step:
    """scale: the gradient that the sum of all losses has. sums: of this process, by name."""

    target_tokens = 1
    scale = 1.0
    sums: dict[str, Tensor] = {}


def begin(target_tokens: int, loss_scale: float = 1.0) -> None:
    """target_tokens: of the step's whole batch, over all processes."""
    _Step.target_tokens, _Step.scale = target_tokens, loss_scale / target_tokens
    _Step.sums = {}


def parts(*names: str, device: torch.device) -> dict[str, Tensor]:
    """This process's part of the mean of each loss over the step's target tokens, layers added up;
    0 where no layer has it. The parts of all processes sum to the mean."""
    none = torch.zeros((), dtype=torch.float64, device=device)
    return {name: _Step.sums.get(name, none) / _Step.target_tokens for name in names}


def with_loss(x: Tensor, loss: Tensor, name: str, alike: Axis | None = None) -> Tensor:
    """x as it is; the backward starts at `loss` (a sum over tokens) too, and counts it as `name`.

    alike: ranks that all have this same loss, of whom each counts a share.
    """
    return _WithLoss.apply(x, loss, name, 1 if alike is None else alike.size)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, name: str, ranks: int) -> Tensor:
        ctx.loss, ctx.name, ctx.ranks = loss.detach(), name, ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # counted here: evaluation has no backward, and what is computed again has still but one
        own = ctx.loss.double() / ctx.ranks
        _Step.sums[ctx.name] = _Step.sums.get(ctx.name, 0.0) + own
        return gradient, torch.full_like(ctx.loss, _Step.scale), None, None
