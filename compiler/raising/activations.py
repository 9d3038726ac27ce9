"""Activations that a model writes out, found from their last step."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import fx

from llmspec.compiler.ops import elementwise
from llmspec.compiler.raising.matching import (
    call,
    closely,
    orders,
    same,
    scalar,
    with_scalar,
)
from llmspec.compiler.raising.trace import Trace, opname
from llmspec.compiler.raising.unit import UnitRaiser
from llmspec.compiler.raising.views import View


def _activated(r: UnitRaiser, at: fx.Node, function: Any, x: fx.Node) -> View:
    view = r.resolved(r.value(x))
    return replace(view, node=r.emit(function, view.node, label="hidden", at=at))


def _cubed(trace: Trace, value: Any, x: Any) -> bool:
    """Whether the value is 0.044715 · x³."""
    found = with_scalar(trace, call(trace, value, "mul"))
    if found is None or not closely(found[1], 0.044715):
        return False
    power = call(trace, found[0], "pow")
    return power is not None and scalar(trace, power.args[1]) == 3 and same(trace, power.args[0], x)


def _tanh_gate(trace: Trace, value: Any, x: Any) -> bool:
    """Whether the value is tanh(sqrt(2/π) (x + 0.044715 x³))."""
    gate = call(trace, value, "tanh")
    inner = with_scalar(trace, call(trace, gate.args[0], "mul")) if gate is not None else None
    if inner is None or not closely(inner[1], math.sqrt(2 / math.pi)):
        return False
    total = call(trace, inner[0], "add")
    return total is not None and any(
        same(trace, a, x) and _cubed(trace, b, x) for a, b in orders(total)
    )


def _erf_gate(trace: Trace, value: Any, x: Any) -> bool:
    """Whether the value is erf(x / sqrt(2))."""
    gate = call(trace, value, "erf")
    inner = call(trace, gate.args[0], "div", "mul") if gate is not None else None
    if inner is None:
        return False
    factor = scalar(trace, inner.args[1])
    wanted = math.sqrt(2) if opname(inner) == "div" else math.sqrt(0.5)
    return closely(factor, wanted) and same(trace, inner.args[0], x)


def written_gelu(r: UnitRaiser, node: fx.Node) -> View | None:
    """0.5 · x · (1 + gate), the three factors in any order."""
    trace = r.trace
    factors = _factors(trace, node)
    half = [f for f in factors if closely(scalar(trace, f), 0.5)]
    rest = [f for f in factors if scalar(trace, f) is None]
    if len(half) != 1 or len(rest) != 2:
        return None
    for x, gate in (rest, rest[::-1]):
        inner = with_scalar(trace, call(trace, gate, "add"))
        if inner is None or inner[1] != 1:
            continue
        if _tanh_gate(trace, inner[0], x):
            return _activated(r, node, elementwise.gelu_tanh, x)
        if _erf_gate(trace, inner[0], x):
            return _activated(r, node, elementwise.gelu, x)
    return None


def _factors(trace: Trace, value: Any, depth: int = 2) -> list[Any]:
    product = call(trace, value, "mul") if depth else None
    if product is None:
        return [value]
    return [f for a in product.args[:2] for f in _factors(trace, a, depth - 1)]


def written_silu(r: UnitRaiser, node: fx.Node) -> View | None:
    for x, gate in orders(node):
        sigmoid = call(r.trace, gate, "sigmoid")
        if sigmoid is not None and same(r.trace, sigmoid.args[0], x):
            return _activated(r, node, elementwise.silu, sigmoid.args[0])  # type: ignore[arg-type]
    return None
