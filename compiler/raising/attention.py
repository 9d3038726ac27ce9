"""Attention, called or written out, found from its last step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from llmspec.compiler.ops import elementwise
from llmspec.compiler.ops.attention import attention, mask
from llmspec.compiler.ops.weights import masked_softmax, mixture, scores
from llmspec.compiler.raising.matching import (
    argument,
    call,
    closely,
    last_dim,
    orders,
    same_along,
    scalar,
    strip,
    with_scalar,
)
from llmspec.compiler.raising.rotary import HEADS_BEFORE_TOKENS
from llmspec.compiler.raising.trace import Trace, opname, shape_of
from llmspec.compiler.raising.unit import UnitRaiser
from llmspec.compiler.raising.views import REPEATED, Atom, View, axis_size, permuted, whole

FAR_BELOW = -1e4
"""Scores lowered by this much have no weight: exp of it is zero in every type."""


def mask_kind(seen: Tensor) -> tuple[bool, int | None] | None:
    """(causal, window) of a mask [.., T, S], True where a query may look; None: another mask."""
    lead = list(range(seen.dim() - 2))
    flat = same_along(seen, lead)
    if flat is None:
        return None
    square = flat.reshape(seen.shape[-2:])
    tokens, keys = square.shape
    if bool(square.all()):
        return False, None
    if tokens != keys:
        return None
    here = torch.device("cpu")
    if torch.equal(square, mask(tokens, keys, True, None, here)):
        return True, None
    window = int(square[-1].sum())
    for causal in (True, False):
        if torch.equal(square, mask(tokens, keys, causal, window, here)):
            return causal, window
    return None


def _seen(value: Tensor) -> Tensor | None:
    """Where an additive or boolean mask lets through; None when it does more than let through."""
    if value.dtype == torch.bool:
        return value
    hidden = value <= FAR_BELOW
    return ~hidden if bool(((value == 0) | hidden).all()) else None


class Scores:
    """softmax(scale · q kᵀ, masked): what the steps back from a softmax have gathered."""

    def __init__(self, q: fx.Node, k: Any, scale: float, masks: list[Tensor]):
        self.q, self.k, self.scale, self.masks = q, k, scale, masks

    def kind(self) -> tuple[bool, int | None] | None:
        if not self.masks:
            return False, None
        seen = self.masks[0]
        for other in self.masks[1:]:
            seen = seen & other
        return mask_kind(seen)


def _gather_scores(trace: Trace, value: Any) -> Scores | None:
    scale, masks = 1.0, []
    while True:
        node = strip(trace, value)
        if not isinstance(node, fx.Node):
            return None
        match opname(node):
            case "mul" | "div" if (c := scalar(trace, node.args[1])) is not None:
                scale *= c if opname(node) == "mul" else 1 / c
                value = node.args[0]
            case "mul" if (found := with_scalar(trace, node)) is not None:
                value, scale = found[0], scale * found[1]
            case "add" | "masked_fill" | "where":
                found_mask = _mask_step(trace, node)
                if found_mask is None:
                    return None
                value, seen = found_mask
                masks.append(seen)
            case "matmul" | "bmm":
                return Scores(node.args[0], node.args[1], scale, masks)  # type: ignore[arg-type]
            case _:
                return None


def _mask_step(trace: Trace, node: fx.Node) -> tuple[Any, Tensor] | None:
    """(scores before, where they are seen) of one masking step."""
    match opname(node):
        case "add":
            for x, c in orders(node):
                if isinstance(c, fx.Node) and trace.is_constant(c) and isinstance(x, fx.Node):
                    seen = _seen(trace.constant(c))
                    return None if seen is None else (x, seen)
        case "masked_fill":
            x, hidden, low = node.args[:3]
            number = scalar(trace, low)
            if trace.is_constant(hidden) and number is not None and number <= FAR_BELOW:  # type: ignore[arg-type]
                return x, ~trace.constant(hidden).bool()  # type: ignore[arg-type]
        case "where":
            keep, x, other = node.args[:3]
            number = scalar(trace, other)
            if trace.is_constant(keep) and number is not None and number <= FAR_BELOW:  # type: ignore[arg-type]
                return x, trace.constant(keep).bool()  # type: ignore[arg-type]
    return None


def _ungrouped(view: View) -> View | None:
    """Keys or values [B, H, S, E] without the repetition of each head for its group of queries."""
    axes = list(view.axes)
    heads = axes[1]
    if heads and heads[-1].dim == REPEATED:
        axes[1] = heads[:-1] or (Atom(REPEATED, 0, 1),)
    if any(a.dim == REPEATED and a.size > 1 for axis in axes for a in axis):
        return None
    axes[1] = tuple(a for a in axes[1] if a.dim != REPEATED)
    return replace(view, axes=tuple(axes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    """What is between q kᵀ and the weights. kind: (causal, window). explicit: written out."""

    scale: float
    kind: tuple[bool, int | None]
    dropout: float
    explicit: bool


def attend(r: UnitRaiser, at: fx.Node, q: View, k: View, v: View, square: Square) -> View | None:
    """q, k, v in [B, H, T, E]."""
    keys, values = _ungrouped(k), _ungrouped(v)
    if keys is None or values is None or len(q.axes) != 4:
        return None
    heads, groups = axis_size(q.axes[1]), axis_size(keys.axes[1])
    if groups != axis_size(values.axes[1]) or groups == 0 or heads % groups:
        return None
    if axis_size(q.axes[3]) != axis_size(v.axes[3]):
        return None
    query, key, value = (r.exact(permuted(x, HEADS_BEFORE_TOKENS)) for x in (q, keys, values))
    factor = square.scale * math.sqrt(axis_size(q.axes[3]))
    if not closely(factor, 1.0):
        query = r.emit(elementwise.multiply, query, factor, label="q", at=at)
    causal, window = square.kind
    if square.dropout:
        node = _in_steps(r, at, (query, key, value), square)
    else:
        arguments = (query, key, value, causal, window, square.explicit)
        node = r.emit(attention, *arguments, label="mixed", at=at, dims="BTHE")
    return permuted(whole(node), HEADS_BEFORE_TOKENS)


def _in_steps(r: UnitRaiser, at: fx.Node, operands: tuple[fx.Node, ...], square: Square) -> fx.Node:
    """Attention whose weights are dropped."""
    q, k, v = operands
    raw = r.emit(scores, q, k, label="scores", at=at, dims="BHTS")
    weights = r.emit(masked_softmax, raw, *square.kind, label="weights", at=at, dims="BHTS")
    kept = r.dropped(whole(weights), square.dropout, at).node
    return r.emit(mixture, kept, v, label="mixed", at=at, dims="BTHE")


def _dropped(trace: Trace, value: Any) -> tuple[Any, float]:
    """(what a dropout drops of, its share)."""
    found = call(trace, value, "dropout")
    return (found.args[0], float(found.args[1])) if found is not None else (value, 0.0)  # type: ignore[arg-type]


def written_attention(r: UnitRaiser, node: fx.Node) -> View | None:
    """softmax(scores) @ v."""
    kept, share = _dropped(r.trace, node.args[0])
    weights = call(r.trace, kept, "softmax", "_softmax")
    if weights is None or len(shape_of(node)) != 4 or not last_dim(weights, weights.args[1]):
        return None
    found = _gather_scores(r.trace, weights.args[0])
    if found is None or len(shape_of(found.q)) != 4:
        return None
    kind = found.kind()
    if kind is None:
        return None
    turned = permuted(r.value(strip(r.trace, found.k)), (0, 1, 3, 2))
    q, v = r.value(strip(r.trace, found.q)), r.value(strip(r.trace, node.args[1]))
    square = Square(scale=found.scale, kind=kind, dropout=share, explicit=True)
    return attend(r, node, q, turned, v, square)


def sdpa(r: UnitRaiser, node: fx.Node) -> View | None:
    """F.scaled_dot_product_attention, with a mask that is causal, a window or none."""
    q, k, v = (strip(r.trace, a) for a in node.args[:3])
    seen = argument(node, 3, "attn_mask")
    if len(shape_of(q)) != 4:
        return None
    kind: Any = (bool(argument(node, 5, "is_causal", False)), None)
    if isinstance(seen, fx.Node):
        allowed = _seen(r.trace.constant(seen)) if r.trace.is_constant(seen) else None
        kind = mask_kind(allowed) if allowed is not None else None
    if kind is None or (kind[0] and shape_of(q)[2] != shape_of(k)[2]):
        return None
    given = argument(node, 6, "scale")
    square = Square(
        scale=shape_of(q)[3] ** -0.5 if given is None else float(given),
        kind=kind,
        dropout=float(argument(node, 4, "dropout_p", 0.0)),
        explicit=False,
    )
    return attend(r, node, r.value(q), r.value(k), r.value(v), square)
