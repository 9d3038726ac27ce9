"""Rows to experts and back, and the products between: a stack of weights, a product for each.

B sequences, T tokens, D width, X experts, P picks of a token, R rows: the picks of all tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from llmspec.compiler.ops.registry import (
    Entry,
    Localised,
    Printed,
    Rule,
    Saved,
    Shapes,
    index_rule,
    numel,
    register,
    shape_of,
)


def dispatch(x: Tensor, order: Tensor, top_k: int) -> Tensor:
    """x [B, T, D], order [R] -> the token of each pick, by expert [R, D]."""
    return x.flatten(0, 1)[order // top_k]


def grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows [R, I] by expert, weight [X, O, I], counts [X] -> [R, O]."""
    if rows.is_meta:
        return rows.new_empty(rows.shape[0], weight.shape[1])
    parts = rows.split(counts.tolist())
    return torch.cat([F.linear(part, w) for part, w in zip(parts, weight.unbind(), strict=True)])


def grouped_bias(rows: Tensor, bias: Tensor, counts: Tensor) -> Tensor:
    """rows [R, O] by expert, bias [X, O], counts [X] -> rows + the bias of their expert."""
    if rows.is_meta:
        return torch.empty_like(rows)
    return rows + bias.repeat_interleave(counts, 0)


def combine(rows: Tensor, weights: Tensor, order: Tensor) -> Tensor:
    """rows [R, D] by expert, weights [B, T, P], order [R] -> each token's Σ weight · row."""
    b, t, picks = weights.shape
    weighted = rows * weights.flatten()[order].to(rows.dtype).unsqueeze(-1)
    out = rows.new_zeros(b * t, rows.shape[1]).index_add(0, order // picks, weighted)
    return out.unflatten(0, (b, t))


def _dispatch_rule(node: fx.Node) -> Rule:
    b, t, d = shape_of(node.args[0])  # type: ignore[arg-type]
    return index_rule(
        "b t d, r -> r d",
        {"d": d, "b": b, "t": t, "r": shape_of(node)[0]},
        whole=frozenset("btr"),
        linear=((0,),),
        integer=frozenset({1}),
    )


def _grouped_rule(node: fx.Node) -> Rule:
    r, i = shape_of(node.args[0])  # type: ignore[arg-type]
    x, o, _ = shape_of(node.args[1])  # type: ignore[arg-type]
    return index_rule(
        "r i, x o i, x -> r o",
        {"r": r, "o": o, "i": i, "x": x},
        whole=frozenset("rx"),
        uneven=frozenset("o"),
        linear=((0,), (1,)),
        integer=frozenset({2}),
    )


def _bias_rule(node: fx.Node) -> Rule:
    r, o = shape_of(node)
    return index_rule(
        "r o, x o, x -> r o",
        {"r": r, "o": o, "x": shape_of(node.args[1])[0]},  # type: ignore[arg-type]
        whole=frozenset("rx"),
        uneven=frozenset("o"),
        linear=((0, 1),),
        integer=frozenset({2}),
    )


def _combine_rule(node: fx.Node) -> Rule:
    b, t, p = shape_of(node.args[1])  # type: ignore[arg-type]
    r, d = shape_of(node.args[0])  # type: ignore[arg-type]
    return index_rule(
        "r d, b t p, r -> b t d",
        {"d": d, "r": r, "b": b, "t": t, "p": p},
        whole=frozenset("rbtp"),
        linear=((0,), (1,)),
        integer=frozenset({2}),
    )


def _render(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    name = node.target.__name__  # type: ignore[union-attr]
    return Printed(f"{name}({', '.join(args)})", (("runtime.experts", name),))


def _render_dispatch(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    text = f"dispatch({args[0]}, {args[1]}, top_k={node.args[2]})"
    return Printed(text, (("runtime.experts", "dispatch"),))


def _register(function, rule, *, saved, flops, render=_render, **more) -> None:  # type: ignore[no-untyped-def]
    register(
        Entry(
            name=function.__name__,
            function=function,
            rule=rule,
            flops=flops,
            saved=saved,
            render=render,
            **more,
        )
    )


def _moved(node: fx.Node, shapes: Shapes) -> float:
    return 0.0


def _weighted(node: fx.Node, shapes: Shapes) -> float:
    return 2.0 * numel(shapes.operands[0])


def _product(node: fx.Node, shapes: Shapes) -> float:
    """Each row meets one expert."""
    return 2.0 * numel(shapes.result) * shapes.operands[0][-1]


_register(
    dispatch,
    _dispatch_rule,
    saved=lambda node, shapes: Saved(),
    flops=_moved,
    render=_render_dispatch,
)
_register(
    grouped_linear,
    _grouped_rule,
    saved=lambda node, shapes: Saved(operands=(0, 1)),
    flops=_product,
    contraction=True,
    groups=lambda shapes: shapes.operands[1][0],
)
_register(
    grouped_bias,
    _bias_rule,
    saved=lambda node, shapes: Saved(),
    flops=lambda node, shapes: float(numel(shapes.result)),
)
_register(
    combine,
    _combine_rule,
    # the rows by token, which are as many as the rows by expert, and the weights as they multiply
    saved=lambda node, shapes: Saved(operands=(0, 1)),
    # weights inside the experts' activation instead
    lean=("combine", lambda node, shapes: Saved(operands=(1,))),
    flops=_weighted,
)
