"""Norms that a model writes out, found from their last step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import fx

from llmspec.compiler.ops.norm import layer_norm, layer_norm_no_bias, rms_norm
from llmspec.compiler.raising.emitter import WHOLE
from llmspec.compiler.raising.matching import (
    argument,
    call,
    is_parameter,
    last_dim,
    orders,
    same,
    scalar,
    with_scalar,
)
from llmspec.compiler.raising.trace import Trace, opname, shape_of
from llmspec.compiler.raising.unit import UnitRaiser
from llmspec.compiler.raising.views import View


def _mean_square(trace: Trace, value: Any) -> Any:
    """x of mean(x²) over the last dimension."""
    mean = call(trace, value, "mean")
    if mean is None or not last_dim(mean, mean.args[1]) or not argument(mean, 2, "keepdim"):
        return None
    square = call(trace, mean.args[0], "pow", "mul", "square")
    if square is None:
        return None
    match opname(square):
        case "pow":
            return square.args[0] if scalar(trace, square.args[1]) == 2 else None
        case "mul":
            return square.args[0] if same(trace, *square.args[:2]) else None
    return square.args[0]


def _products(trace: Trace, value: Any, depth: int = 3) -> Iterator[tuple[list[Any], list[Any]]]:
    """Ways to read a value as numerators over denominators, from the least taken apart."""
    yield [value], []
    node = call(trace, value, "mul", "div") if depth else None
    if node is None:
        return
    for above, below in _products(trace, node.args[0], depth - 1):
        if opname(node) == "div":
            yield above, [*below, node.args[1]]
            continue
        for more, under in _products(trace, node.args[1], depth - 1):
            yield above + more, below + under


def _shifted(trace: Trace, value: Any) -> tuple[Any, float] | None:
    """(v, eps) of v + eps."""
    return with_scalar(trace, call(trace, value, "add"))


def _scaled(trace: Trace, value: Any) -> Iterator[tuple[list[Any], Any, float]]:
    """(factors, v, eps) of factors / sqrt(v + eps), in any of its spellings."""
    for above, below in _products(trace, value):
        if len(below) == 1:
            root = call(trace, below[0], "sqrt")
            inner = _shifted(trace, root.args[0]) if root is not None else None
            if inner is not None:
                yield above, *inner
        if below:
            continue
        for position, factor in enumerate(above):
            root = call(trace, factor, "rsqrt", "pow")
            if root is None or (opname(root) == "pow" and scalar(trace, root.args[1]) != -0.5):
                continue
            if (inner := _shifted(trace, root.args[0])) is not None:
                yield above[:position] + above[position + 1 :], *inner


def _weighted(trace: Trace, factors: list[Any], size: int) -> tuple[fx.Node, Any] | None:
    """(weight, x) of two factors of which one is a parameter."""
    if len(factors) != 2:
        return None
    for w, x in (factors, factors[::-1]):
        weight = is_parameter(trace, w, size)
        if weight is not None:
            return weight, x
    return None


def written_rms_norm(r: UnitRaiser, node: fx.Node) -> View | None:
    """weight · x / sqrt(mean(x²) + eps)."""
    for factors, mean, eps in _scaled(r.trace, node):
        found = _weighted(r.trace, factors, shape_of(node)[-1])
        inner = _mean_square(r.trace, mean)
        if found is not None and inner is not None and same(r.trace, inner, found[1]):
            return norm(r, node, rms_norm, found[1], (found[0],), eps)
    return None


def norm(
    r: UnitRaiser, at: fx.Node, function: Any, x: fx.Node, weights: tuple[fx.Node, ...], eps: float
) -> View:
    view = r.focused(r.value(x))
    nodes = [r.weight(r.trace.parameters[w], WHOLE) for w in weights]
    made = r.emit(function, view.node, *nodes, eps, label="normed", at=at)
    return replace(view, node=made)


def _centred(trace: Trace, value: Any) -> fx.Node | None:
    """x of x - mean(x)."""
    difference = call(trace, value, "sub")
    if difference is None:
        return None
    mean = call(trace, difference.args[1], "mean")
    if mean is None or not last_dim(mean, mean.args[1]) or not argument(mean, 2, "keepdim"):
        return None
    return difference.args[0] if same(trace, mean.args[0], difference.args[0]) else None  # type: ignore[return-value]


def _variance(trace: Trace, value: Any, x: fx.Node) -> bool:
    """Whether the value is the population variance of x."""
    var = call(trace, value, "var")
    if var is not None:
        correction: Any = var.kwargs.get("correction", argument(var, 2, "unbiased", True))
        return bool(correction == 0) and last_dim(var, var.args[1]) and same(trace, var.args[0], x)
    centred = _mean_square(trace, value)
    inner = _centred(trace, centred) if centred is not None else None
    return inner is not None and same(trace, inner, x)


def _standardised(trace: Trace, value: Any, size: int) -> tuple[fx.Node, fx.Node, float] | None:
    """(weight, x, eps) of weight · (x - mean) / sqrt(var + eps)."""
    for factors, variance, eps in _scaled(trace, value):
        found = _weighted(trace, factors, size)
        x = _centred(trace, found[1]) if found is not None else None
        if found is not None and x is not None and _variance(trace, variance, x):
            return found[0], x, eps
    return None


def written_layer_norm(r: UnitRaiser, node: fx.Node) -> View | None:
    """weight · standardised + bias."""
    size = shape_of(node)[-1]
    for scaled, b in orders(node):
        bias = is_parameter(r.trace, b, size)
        found = _standardised(r.trace, scaled, size) if bias is not None else None
        if bias is not None and found is not None:
            return norm(r, node, layer_norm, found[1], (found[0], bias), found[2])
    return None


def written_layer_norm_no_bias(r: UnitRaiser, node: fx.Node) -> View | None:
    found = _standardised(r.trace, node, shape_of(node)[-1])
    if found is None:
        return None
    return norm(r, node, layer_norm_no_bias, found[1], (found[0],), found[2])
