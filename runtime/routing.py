"""Which experts a token is sent to, and with what weights.

B sequences  T tokens  D width  X experts  P picks of a token  R rows: picks that are kept
A pick that an expert has no room for is written as its complement: ~e, which is negative.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .auxiliary import with_loss
from .mesh import Axis


def router(x_BTD: Tensor, weight_XD: Tensor) -> Tensor:
    """Logits [B, T, X], float32 at least: choices among near experts hang on the last digits."""
    return _Router.apply(x_BTD, weight_XD)


def choose_experts(
    logits_BTX: Tensor,
    *,
    top_k: int,
    gate: str = "softmax",
    groups: int = 1,
    top_groups: int = 1,
    bias_X: Tensor | None = None,
) -> Tensor:
    """The experts of each token, best first [B, T, P].

    groups: experts lie in so many, of which each token uses the `top_groups` whose two best sum
    up highest. bias_X: added to the scores for choosing alone.
    """
    scores_BTX = logits_BTX.detach()
    if groups > 1 or bias_X is not None:
        scores_BTX = scores_BTX.sigmoid() if gate == "sigmoid" else scores_BTX.softmax(-1)
    if bias_X is not None:
        scores_BTX = scores_BTX + bias_X
    if groups > 1:
        scores_BTGx = scores_BTX.unflatten(-1, (groups, -1))
        best_BTG = scores_BTGx.topk(min(2, scores_BTGx.shape[-1]), dim=-1).values.sum(-1)
        open_BTg = best_BTG.topk(top_groups, dim=-1).indices
        closed_BTG = torch.ones_like(best_BTG, dtype=torch.bool).scatter_(-1, open_BTg, False)
        scores_BTX = scores_BTGx.masked_fill(closed_BTG.unsqueeze(-1), float("-inf")).flatten(-2)
    return scores_BTX.topk(top_k, dim=-1).indices


def drop_over_capacity(experts_BTP: Tensor, capacity: int) -> Tensor:
    """What is over `capacity` of an expert in a sequence becomes ~e: later picks before earlier
    ones, later tokens before earlier ones, so that no other sequence decides."""
    picks_BN = experts_BTP.transpose(1, 2).flatten(1)
    by_expert_BN, order_BN = picks_BN.sort(dim=1, stable=True)
    first_BN = torch.searchsorted(by_expert_BN, by_expert_BN)
    place_BN = torch.arange(picks_BN.shape[1], device=picks_BN.device) - first_BN
    over_BN = torch.empty_like(place_BN).scatter_(1, order_BN, place_BN) >= capacity
    kept_BN = torch.where(over_BN, ~picks_BN, picks_BN)
    return kept_BN.unflatten(1, (experts_BTP.shape[2], -1)).transpose(1, 2).contiguous()


def sequence_load(experts_BTP: Tensor, experts: int, context: Axis | None = None) -> Tensor:
    """How many picks of each sequence chose each expert, dropped ones too [B, X].

    context: the ranks that share the sequences, each with a part of their tokens.
    """
    chosen_BN = _chosen(experts_BTP).flatten(1)
    load_BX = chosen_BN.new_zeros(chosen_BN.shape[0], experts)
    load_BX.scatter_add_(1, chosen_BN, torch.ones_like(chosen_BN))
    if context is not None:
        dist.all_reduce(load_BX, group=context.group)
    return load_BX


def with_balance_loss(
    logits_BTX: Tensor,
    load_BX: Tensor,
    *,
    coefficient: float,
    gate: str,
    alike: Axis | None = None,
) -> Tensor:
    """The logits as they are; adds coefficient · Σ load · probability to the losses.

    coefficient: of the spec, times experts / (picks · tokens of a whole sequence).
    alike: ranks that have the same logits.
    """
    if gate == "softmax":
        shares_BTX = logits_BTX.softmax(-1)
    else:
        scores_BTX = logits_BTX.sigmoid()
        shares_BTX = scores_BTX / scores_BTX.sum(-1, keepdim=True)
    load_B1X = load_BX.to(shares_BTX.dtype).unsqueeze(1) * coefficient
    loss = (shares_BTX * load_B1X).sum()
    return with_loss(logits_BTX, loss, "balance_loss", alike)


def with_z_loss(logits_BTX: Tensor, *, coefficient: float, alike: Axis | None = None) -> Tensor:
    """The logits as they are; adds coefficient · logsumexp² of each token to the losses.

    alike: ranks that have the same logits.
    """
    loss = logits_BTX.logsumexp(-1).square().sum() * coefficient
    return with_loss(logits_BTX, loss, "z_loss", alike)


def gate_weights(
    logits_BTX: Tensor,
    experts_BTP: Tensor,
    *,
    gate: str,
    normalise: bool,
    scale: float = 1.0,
    drops: bool = False,
) -> Tensor:
    """What each pick's result counts [B, T, P]; nothing when it was dropped.

    normalise: the weights of a token's picks, dropped ones too, sum to `scale`.
    drops: whether some may have been dropped.
    """
    picked_BTP = logits_BTX.gather(-1, _chosen(experts_BTP) if drops else experts_BTP)
    if gate == "sigmoid":
        weights_BTP = picked_BTP.sigmoid()
        if normalise:
            weights_BTP = weights_BTP / (weights_BTP.sum(-1, keepdim=True) + 1e-20)
    elif normalise:  # what all experts have in common cancels
        weights_BTP = picked_BTP.softmax(-1)
    else:
        weights_BTP = (picked_BTP - logits_BTX.logsumexp(-1, keepdim=True)).exp()
    if scale != 1.0:
        weights_BTP = weights_BTP * scale
    return weights_BTP.masked_fill(experts_BTP < 0, 0.0) if drops else weights_BTP


def expert_order(experts_BTP: Tensor, drops: bool) -> Tensor:
    """The flat places of all kept picks, by expert, then by place [R].

    drops: whether some may be dropped; then GPUs wait to learn how many are left.
    """
    flat_N = experts_BTP.flatten()
    order_N = flat_N.argsort(stable=True)  # dropped ones are negative and come first
    return order_N[int((flat_N < 0).sum()) :] if drops else order_N


def expert_counts(experts_BTP: Tensor, load_2X: Tensor) -> Tensor:
    """How many kept picks each expert has [X].

    load_2X: in training, what was chosen and what of it was dropped is added here.
    """
    flat_N = experts_BTP.flatten()
    counts_X = _count(flat_N, flat_N >= 0, load_2X)
    if torch.is_grad_enabled():
        load_2X[0] += _count(_chosen(flat_N), torch.ones_like(flat_N), load_2X)
        load_2X[1] += _count(~flat_N, flat_N < 0, load_2X)
    return counts_X


def _count(experts_N: Tensor, counted_N: Tensor, load_2X: Tensor) -> Tensor:
    """Of the counted ones, how many are each expert's; no host waits for it."""
    return load_2X.new_zeros(load_2X.shape[1]).scatter_add_(
        0, experts_N.clamp(min=0), counted_N.to(load_2X.dtype)
    )


def _chosen(experts: Tensor) -> Tensor:
    return torch.where(experts < 0, ~experts, experts)


class _Router(torch.autograd.Function):
    """Keeps x and the weight in their own types; wide copies of them live for one product."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_XD: Tensor) -> Tensor:
        ctx.save_for_backward(x_BTD, weight_XD)
        wide = torch.promote_types(x_BTD.dtype, torch.float32)
        return F.linear(x_BTD.to(wide), weight_XD.to(wide))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTX: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_BTD, weight_XD = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (gradient_BTX @ weight_XD.to(gradient_BTX.dtype)).to(x_BTD.dtype)
        if ctx.needs_input_grad[1]:
            x_ND = x_BTD.flatten(0, -2).to(gradient_BTX.dtype)
            grad_weight = (gradient_BTX.flatten(0, -2).T @ x_ND).to(weight_XD.dtype)
        return grad_x, grad_weight
