"""Changes of shape: a dimension into factors and back, one of a stack, heads side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from llmspec.compiler.ops.registry import (
    Entry,
    Factors,
    Localised,
    Printed,
    Rule,
    Saved,
    index_rule,
    letters,
    register,
    shape_of,
)


def unflatten(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The last dimension into factors, major first: […, N·M] -> […, N, M]."""
    return x.unflatten(-1, sizes)


def flatten(x: Tensor, count: int) -> Tensor:
    """The last `count` dimensions into one."""
    return x.flatten(-count)


def join(x: Tensor, y: Tensor) -> Tensor:
    """x [B, T, H, E], y [B, T, H or 1, F] -> side by side [B, T, H, E + F]; one head serves all."""
    return torch.cat([x, y.expand(*x.shape[:-1], y.shape[-1])], -1)


def select(x: Tensor, dim: int, index: int) -> Tensor:
    """One of a stack: drops dimension `dim` (counted from the end, negative)."""
    return x.select(dim, index)


def _plain(names: Sequence[str]) -> tuple[Factors, ...]:
    return tuple((n,) for n in names)


def _fold_rule(wide: tuple[int, ...], count: int, folded_first: bool) -> Rule:
    """Between a shape whose last `count` dimensions are apart, and the one where they are
    folded.
    """
    names = letters(len(wide))
    apart = _plain(names)
    together = (*_plain(names[:-count]), tuple(names[-count:]))
    operand, result = (together, apart) if folded_first else (apart, together)
    return Rule(
        operands=(operand,),
        result=result,
        sizes=dict(zip(names, wide, strict=True)),
        whole=frozenset(names[:1]),
        linear=((0,),),
    )


def _select_rule(node: fx.Node) -> Rule:
    shape, dim = shape_of(node.args[0]), node.args[1]  # type: ignore[arg-type]
    names = letters(len(shape))
    kept = [n for i, n in enumerate(names) if i != len(shape) + dim]  # type: ignore[operator]
    return Rule(
        operands=(_plain(names),),
        result=_plain(kept),
        sizes=dict(zip(names, shape, strict=True)),
        whole=frozenset({names[0], names[dim]}),  # type: ignore[index]
        linear=((0,),),
    )


def _join_rule(node: fx.Node) -> Rule:
    (b, t, h, e), (_, _, other, f) = (shape_of(a) for a in node.args)  # type: ignore[arg-type]
    return index_rule(
        f"b t h e, b t {'h' if other == h else 'o'} f -> b t h j",
        {"b": b, "t": t, "h": h, "e": e, "f": f, "j": e + f, "o": other},
        whole=frozenset("befjo"),
        linear=((0, 1),),
    )


def _render_join(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    x, y = args
    if shape_of(node.args[1])[2] == 1:  # type: ignore[arg-type]
        y = f"{y}.expand(-1, -1, {x}.shape[2], -1)"
    return Printed(f"torch.cat([{x}, {y}], dim=-1)")


def _render_unflatten(node: fx.Node, args: Sequence[str], local: Localised) -> Printed:
    sizes = list(node.args[1])  # type: ignore[arg-type]
    sizes[0] = -1  # the major factor may be split over ranks
    return Printed(f"{args[0]}.unflatten(-1, ({', '.join(map(str, sizes))}))")


def _render_flatten(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    return Printed(f"{args[0]}.flatten(-{node.args[1]})")


def _render_select(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    return Printed(f"{args[0]}.select({node.args[1]}, {node.args[2]})")


def _register(function, rule, render) -> None:  # type: ignore[no-untyped-def]
    register(
        Entry(
            name=function.__name__,
            function=function,
            rule=rule,
            flops=lambda node, shapes: 0.0,
            saved=lambda node, shapes: Saved(),
            render=render,
            alias=True,
        )
    )


_register(
    unflatten,
    lambda node: _fold_rule(shape_of(node), len(node.args[1]), folded_first=True),
    _render_unflatten,
)
_register(
    flatten,
    lambda node: _fold_rule(shape_of(node.args[0]), node.args[1], folded_first=False),
    _render_flatten,
)
_register(select, _select_rule, _render_select)
register(
    Entry(
        name="join",
        function=join,
        rule=_join_rule,
        flops=lambda node, shapes: 0.0,
        saved=lambda node, shapes: Saved(),
        render=_render_join,
    )
)
