"""Two values element by element, whatever each of them looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx

from llmspec.compiler.ops import elementwise
from llmspec.compiler.raising.matching import scalar
from llmspec.compiler.raising.trace import value_of
from llmspec.compiler.raising.unit import Rule, UnitRaiser
from llmspec.compiler.raising.views import View, is_repeated, permuted, whole

LABELS = {
    elementwise.add: "x",
    elementwise.subtract: "difference",
    elementwise.multiply: "hidden",
    elementwise.divide: "quotient",
}


def label_of(function: Callable[..., Any]) -> str:
    return LABELS.get(function, "hidden")


def with_number(
    r: UnitRaiser,
    node: fx.Node,
    function: Callable[..., Any],
    x: fx.Node,
    number: float,
    first: bool,
) -> View:
    view = r.resolved(r.value(x))
    args = (number, view.node) if first else (view.node, number)
    dims = view.node.meta["dims"]
    return replace(view, node=r.emit(function, *args, label=label_of(function), at=node, dims=dims))


def binary(function: Callable[..., Any]) -> Rule:
    def rule(r: UnitRaiser, node: fx.Node) -> View | None:
        a, b = node.args[:2]
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode"):
            return None
        if not value_of(node).dtype.is_floating_point:
            return None
        left, right = scalar(r.trace, a), scalar(r.trace, b)
        if right is not None and isinstance(a, fx.Node):
            return with_number(r, node, function, a, right, False)
        if left is not None and isinstance(b, fx.Node):
            return with_number(r, node, function, b, left, True)
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return None
        first, second = (b, a) if r.trace.is_constant(a) else (a, b)
        known = {first: r.value(first)}
        if not r.is_floating(r.donor):
            r.donor = known[first].node
        known[second] = r.value(second)
        return together(r, node, function, known[a], known[b])

    return rule


def _layout(view: View) -> tuple[Any, ...]:
    return (view.node.meta["shape"], view.axes, view.picks)


def together(r: UnitRaiser, at: fx.Node, function: Callable[..., Any], a: View, b: View) -> View:
    a, b = r.resolved(a), r.resolved(b)
    if _layout(a) == _layout(b):
        node = r.emit(function, a.node, b.node, label=label_of(function), at=at)
        return replace(a, node=node)
    rank = max(len(a.axes), len(b.axes))
    a, b = (replace(v, axes=((),) * (rank - len(v.axes)) + v.axes) for v in (a, b))
    order = _common_order(a, b)
    left, right = (_broadcast(r, permuted(v, order)) for v in (a, b))
    lead = left if len(left.meta["shape"]) >= len(right.meta["shape"]) else right
    node = r.emit(function, left, right, label=label_of(function), at=at, dims=lead.meta["dims"])
    back = [order.index(i) for i in range(rank)]
    return permuted(_padded(whole(node), rank), back)


def _padded(view: View, rank: int) -> View:
    return replace(view, axes=((),) * (rank - len(view.axes)) + view.axes)


def _common_order(a: View, b: View) -> list[int]:
    """The order of axes in which the fuller of two views is laid out."""
    fuller = a if sum(map(bool, a.axes)) >= sum(map(bool, b.axes)) else b
    if is_repeated(tuple(x for axis in fuller.axes for x in axis)):
        fuller = b if fuller is a else a
    if any(not axis for axis in fuller.axes):
        return list(range(len(fuller.axes)))
    return sorted(
        range(len(fuller.axes)), key=lambda i: (fuller.axes[i][0].dim, -fuller.axes[i][0].stride)
    )


def _broadcast(r: UnitRaiser, view: View) -> fx.Node:
    """The view's node, leading axes that are repeated or of size 1 left out."""
    axes = list(view.axes)
    while len(axes) > 1 and all(a.size == 1 or is_repeated((a,)) for a in axes[0]):
        axes.pop(0)
    lean = replace(view, axes=tuple(axes))
    plain = r.plain(lean)
    if plain is not None and plain[0].meta["shape"] == lean.shape:
        return plain[0]
    return r.exact(lean)
