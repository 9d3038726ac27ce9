"""The quarter turns that rotary positions are made of, where their tables are a model's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from llmspec.compiler.ops.registry import (
    Entry,
    Localised,
    Printed,
    Rule,
    Saved,
    letters,
    numel,
    register,
    shape_of,
)


def turn_halves(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the halves of the last dimension."""
    low, high = x.chunk(2, -1)
    return torch.cat([-high, low], -1)


def turn_pairs(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for neighbours in the last dimension."""
    pairs = x.unflatten(-1, (-1, 2))
    return torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)


def _rule(node: fx.Node) -> Rule:
    shape = shape_of(node)
    names = letters(len(shape))
    dims = tuple((n,) for n in names)
    sizes = dict(zip(names, shape, strict=True))
    whole = frozenset({names[0], names[-1]})
    return Rule(operands=(dims,), result=dims, sizes=sizes, whole=whole, linear=((0,),))


def _render_halves(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    x, half = args[0], shape_of(node)[-1] // 2
    return Printed(f"torch.cat([-{x}[..., {half}:], {x}[..., :{half}]], -1)")


def _render_pairs(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    x = args[0]
    return Printed(f"torch.stack([-{x}[..., 1::2], {x}[..., ::2]], -1).flatten(-2)")


for _function, _render in ((turn_halves, _render_halves), (turn_pairs, _render_pairs)):
    register(
        Entry(
            name=_function.__name__,
            function=_function,
            rule=_rule,
            flops=lambda node, shapes: float(numel(shapes.result)),
            saved=lambda node, shapes: Saved(),
            render=_render,
        )
    )
