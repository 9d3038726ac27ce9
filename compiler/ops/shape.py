"""Changes of shape that move no bytes: a dimension into factors and back, one of a stack."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from llmspec.compiler.ops.registry import (
    Entry,
    Factors,
    Localised,
    Printed,
    Rule,
    Saved,
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
