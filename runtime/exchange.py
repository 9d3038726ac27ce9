"""Rows of tokens to the ranks that have their experts, and back: all-to-alls of uneven size.

R rows of this rank's tokens, grouped by expert  S rows that this rank's experts get, grouped by its
experts  D width  X experts  x experts of this rank
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Axis


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Who gets how many rows of whom.

    sent, received: rows to and from each rank of the axis.
    counts_x: rows that each of this rank's experts gets.
    order_S, inverse_S: arrived rows come rank by rank; `order_S` groups them by expert.
    """

    axis: Axis
    sent: list[int]
    received: list[int]
    counts_x: Tensor
    order_S: Tensor
    inverse_S: Tensor


def exchange_counts(counts_X: Tensor, axis: Axis) -> Exchange:
    """What the ranks' routers have chosen, made known to those who have the experts."""
    to_rank_Ex = counts_X.view(axis.size, -1).contiguous()
    from_rank_Ex = torch.empty_like(to_rank_Ex)
    dist.all_to_all_single(from_rank_Ex, to_rank_Ex, group=axis.group)
    # the one wait for the device: an all-to-all takes its sizes from the host
    sent, received = torch.stack([to_rank_Ex.sum(1), from_rank_Ex.sum(1)]).tolist()
    experts_x = torch.arange(to_rank_Ex.shape[1], device=counts_X.device)
    expert_of_S = experts_x.repeat(axis.size).repeat_interleave(
        from_rank_Ex.flatten(), output_size=sum(received)
    )
    order_S = expert_of_S.argsort(stable=True)
    return Exchange(
        axis=axis,
        sent=sent,
        received=received,
        counts_x=from_rank_Ex.sum(0),
        order_S=order_S,
        inverse_S=order_S.argsort(),
    )


def send_to_experts(rows_RD: Tensor, exchange: Exchange) -> Tensor:
    """-> rows_SD; backward: the gradients the other way."""
    return _ToExperts.apply(rows_RD, exchange)


def return_to_tokens(rows_SD: Tensor, exchange: Exchange) -> Tensor:
    """-> rows_RD; backward: the gradients the other way."""
    return _ToTokens.apply(rows_SD, exchange)


class _ToExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return _send(rows_RD, exchange)

    @staticmethod
    def backward(ctx: Any, gradient_SD: Tensor) -> Any:
        return _return(gradient_SD, ctx.exchange), None


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return _return(rows_SD, exchange)

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> Any:
        return _send(gradient_RD, ctx.exchange), None


def _send(rows_RD: Tensor, e: Exchange) -> Tensor:
    arrived_SD = rows_RD.new_empty((sum(e.received), *rows_RD.shape[1:]))
    dist.all_to_all_single(arrived_SD, rows_RD.contiguous(), e.received, e.sent, group=e.axis.group)
    return arrived_SD.index_select(0, e.order_S)


def _return(rows_SD: Tensor, e: Exchange) -> Tensor:
    back_RD = rows_SD.new_empty((sum(e.sent), *rows_SD.shape[1:]))
    by_rank_SD = rows_SD.index_select(0, e.inverse_S)
    dist.all_to_all_single(back_RD, by_rank_SD, e.sent, e.received, group=e.axis.group)
    return back_RD
