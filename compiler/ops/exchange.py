"""Rows between the tokens' ranks and their experts' ranks: what expert ranks send each other.

R rows, X experts. How many rows arrive is known only while a program runs; the shape is that of
ranks which are all chosen alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, fx

from llmspec.compiler.ops.registry import (
    Entry,
    Localised,
    Numbers,
    Printed,
    Rule,
    Saved,
    Sends,
    Shapes,
    index_rule,
    numel,
    register,
    shape_of,
)
from llmspec.compiler.placement import Collective

INDEX_BYTES = 8


def exchange_counts(counts: Tensor, ranks: int) -> Tensor:
    """counts [X] of this rank's tokens -> of each rank's tokens for this rank's experts
    [ranks, X / ranks]. Here as if all ranks' tokens chose alike.
    """
    return counts.unflatten(0, (ranks, -1))


def own_counts(exchange: Tensor) -> Tensor:
    """exchange [ranks, x] -> the rows that each of this rank's experts gets [x]."""
    return exchange.sum(0)


def send_to_experts(rows: Tensor, exchange: Tensor) -> Tensor:
    """rows [R, D] of this rank's tokens by expert -> all rows of this rank's experts [R, D]."""
    return rows


def return_to_tokens(rows: Tensor, exchange: Tensor) -> Tensor:
    """rows [R, D] of this rank's experts -> those of this rank's tokens by expert [R, D]."""
    return rows


def _counts_rule(node: fx.Node) -> Rule:
    """Integers out of integers: nothing is split, and no gradient comes back."""
    operand = [f"o{i}" for i in range(len(shape_of(node.args[0])))]  # type: ignore[arg-type]
    result = [f"r{i}" for i in range(len(shape_of(node)))]
    sizes = dict(zip(operand, shape_of(node.args[0]), strict=True))  # type: ignore[arg-type]
    sizes |= dict(zip(result, shape_of(node), strict=True))
    return Rule(
        operands=(tuple((n,) for n in operand),),
        result=tuple((n,) for n in result),
        sizes=sizes,
        whole=frozenset(sizes),
        integer=frozenset({0}),
        chooses=True,
    )


def _rows_rule(node: fx.Node) -> Rule:
    r, d = shape_of(node)
    n, x = shape_of(node.args[1])  # type: ignore[arg-type]
    return index_rule(
        "r d, n x -> r d",
        {"r": r, "d": d, "n": n, "x": x},
        whole=frozenset("rnx"),
        linear=((0,),),
        integer=frozenset({1}),
    )


def _sends_rows(node: fx.Node, shapes: Shapes) -> tuple[Sends, ...]:
    """Every rank's rows, there and their gradients back."""
    ranks, size = shapes.operands[1][0], numel(shapes.operands[0])
    return (
        Sends(
            axis="expert",
            kind=Collective.ALL_TO_ALL,
            elements_forward=ranks * size,
            elements_backward=ranks * size,
        ),
    )


def _counted(node: fx.Node, shapes: Shapes, width: int) -> tuple[Numbers, ...]:
    """Every rank's counts of its tokens by expert."""
    ranks, of_each = shapes.result
    size = INDEX_BYTES * ranks * ranks * of_each
    return (Numbers("expert", Collective.ALL_TO_ALL, size),)


def _printed(name: str, *arguments: str) -> Printed:
    return Printed(f"{name}({', '.join(arguments)})", (("runtime.exchange", name),))


def _render_counts(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    return _printed("exchange_counts", args[0], "self.expert")


def _render_own(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    return Printed(f"{args[0]}.counts_x")


def _render_rows(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    return _printed(node.target.__name__, *args)  # type: ignore[union-attr]


def _register(
    function: Callable[..., Tensor],
    rule: Callable[[fx.Node], Rule],
    render: Callable[[fx.Node, Sequence[str], Localised], Printed],
    sends: Callable[[fx.Node, Shapes], tuple[Sends, ...]] | None = None,
    saved: Callable[[fx.Node, Shapes], Saved] = lambda node, shapes: Saved(),
    numbers: Callable[[fx.Node, Shapes, int], tuple[Numbers, ...]] | None = None,
) -> None:
    register(
        Entry(
            name=function.__name__,
            function=function,
            rule=rule,
            flops=lambda node, shapes: 0.0,
            saved=saved,
            render=render,
            sends=sends,
            numbers=numbers,
        )
    )


_register(exchange_counts, _counts_rule, _render_counts, numbers=_counted)
_register(own_counts, _counts_rule, _render_own)
_register(
    send_to_experts,
    _rows_rule,
    _render_rows,
    sends=_sends_rows,
    # in which order arrived rows lie by expert, and back
    saved=lambda node, shapes: Saved(extra_bytes=2 * INDEX_BYTES * shapes.result[0]),
)
_register(return_to_tokens, _rows_rule, _render_rows, sends=_sends_rows)
