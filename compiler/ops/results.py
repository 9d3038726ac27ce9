"""What operators give on meta tensors, said by shapes alone.

PyTorch's own way there runs its decompositions in Python, which takes milliseconds for each call
and imports its compiler. Operators that are not here go that way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from llmspec.compiler.ops.attention import attention, rotary
from llmspec.compiler.ops.dropout import dropout
from llmspec.compiler.ops.elementwise import (
    add,
    divide,
    gelu,
    gelu_tanh,
    multiply,
    relu,
    sigmoid,
    silu,
    subtract,
    tanh,
)
from llmspec.compiler.ops.embedding import embedding
from llmspec.compiler.ops.exchange import exchange_counts, own_counts
from llmspec.compiler.ops.experts import combine, dispatch, grouped_bias, grouped_linear
from llmspec.compiler.ops.linear import linear
from llmspec.compiler.ops.linear_loss import linear_cross_entropy
from llmspec.compiler.ops.loss import cross_entropy
from llmspec.compiler.ops.norm import layer_norm, layer_norm_no_bias, rms_norm
from llmspec.compiler.ops.projection import projection
from llmspec.compiler.ops.routing import (
    balance_loss,
    choose_experts,
    drop_over_capacity,
    expert_counts,
    expert_order,
    gate_weights,
    router,
    sequence_load,
    z_loss,
)
from llmspec.compiler.ops.shape import join
from llmspec.compiler.ops.turn import turn_halves, turn_pairs
from llmspec.compiler.ops.weights import masked_softmax, mixture, scores

Result = Callable[..., Tensor]


def result_of(function: Callable[..., Any], args: Sequence[Any]) -> Tensor:
    """What `function` gives: of tensors on the meta device, one on the meta device."""
    shaped = RESULTS.get(function)
    found = None if shaped is None else shaped(*args)
    return function(*args) if found is None else found


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def _first(x: Tensor, *_: Any) -> Tensor:
    return _empty(x, *x.shape)


def _broadcast(a: Tensor | float, b: Tensor | float) -> Tensor | None:
    """Of floating numbers; None: types are PyTorch's to say."""
    tensors = [x for x in (a, b) if isinstance(x, Tensor)]
    if not all(x.is_floating_point() and x.dtype == tensors[0].dtype for x in tensors):
        return None
    shapes = zip_longest(*(reversed(x.shape) for x in tensors), fillvalue=1)
    sizes = [sorted({*dims} - {1}) for dims in shapes]
    if any(len(own) > 1 for own in sizes):
        return None
    return _empty(tensors[0], *(own[0] if own else 1 for own in reversed(sizes)))


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return _empty(x, *x.shape[:-1], *weight.shape[:-1])


def _projection(x: Tensor, weight: Tensor) -> Tensor:
    return _empty(x, *x.shape[:-1], *weight.shape[1:])


def _embedding(ids: Tensor, table: Tensor) -> Tensor:
    return _empty(table, *ids.shape, table.shape[1])


def _loss(x: Tensor, *_: Any) -> Tensor:
    return _empty(x)


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return _empty(q, *q.shape[:-1], v.shape[-1])


def _scores(q: Tensor, k: Tensor) -> Tensor:
    b, t, h, _ = q.shape
    return _empty(q, b, h, t, k.shape[1])


def _mixture(weights: Tensor, v: Tensor) -> Tensor:
    b, h, t, _ = weights.shape
    return _empty(v, b, t, h, v.shape[-1])


def _join(x: Tensor, y: Tensor) -> Tensor:
    return _empty(x, *x.shape[:-1], x.shape[-1] + y.shape[-1])


def _router(x: Tensor, weight: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.empty((*x.shape[:-1], weight.shape[0]), dtype=wide, device="meta")


def _chosen(logits: Tensor, top_k: int, *_: Any) -> Tensor:
    return torch.empty((*logits.shape[:-1], top_k), dtype=torch.int64, device="meta")


def _sequence_load(experts: Tensor, count: int) -> Tensor:
    return _empty(experts, experts.shape[0], count)


def _gate_weights(logits: Tensor, experts: Tensor, *_: Any) -> Tensor:
    return _empty(logits, *experts.shape)


def _expert_counts(experts: Tensor, load: Tensor, count: int) -> Tensor:
    return _empty(experts, count)


def _expert_order(experts: Tensor, drops: bool) -> Tensor:
    return _empty(experts, experts.numel())


def _exchange_counts(counts: Tensor, ranks: int) -> Tensor:
    return _empty(counts, ranks, counts.shape[0] // ranks)


def _own_counts(exchange: Tensor) -> Tensor:
    return _empty(exchange, exchange.shape[1])


def _grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _empty(rows, rows.shape[0], weight.shape[1])


def _dispatch(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    return _empty(x, order.shape[0], x.shape[-1])


def _combine(rows: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    return _empty(rows, *weights.shape[:2], rows.shape[1])


RESULTS: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    **dict.fromkeys((add, subtract, multiply, divide), _broadcast),
    **dict.fromkeys((gelu, gelu_tanh, relu, silu, tanh, sigmoid), _first),
    **dict.fromkeys((rms_norm, layer_norm, layer_norm_no_bias), _first),
    **dict.fromkeys((rotary, dropout, masked_softmax, turn_halves, turn_pairs), _first),
    **dict.fromkeys((balance_loss, z_loss, drop_over_capacity, grouped_bias), _first),
    **dict.fromkeys((cross_entropy, linear_cross_entropy), _loss),
    linear: _linear,
    projection: _projection,
    embedding: _embedding,
    attention: _attention,
    scores: _scores,
    mixture: _mixture,
    join: _join,
    router: _router,
    choose_experts: _chosen,
    sequence_load: _sequence_load,
    gate_weights: _gate_weights,
    expert_counts: _expert_counts,
    expert_order: _expert_order,
    exchange_counts: _exchange_counts,
    own_counts: _own_counts,
    grouped_linear: _grouped_linear,
    dispatch: _dispatch,
    combine: _combine,
}
