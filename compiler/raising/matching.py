"""Small questions about a traced graph: what is this node, casts and no-ops looked through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from llmspec.compiler.raising.trace import Trace, opname, shape_of, value_of

CASTS = ("to", "_to_copy", "type_as")
NOTHING = ("alias", "contiguous", "clone", "lift_fresh_copy", "lift_fresh", "positive")


def is_identity(trace: Trace, node: fx.Node) -> bool:
    """Whether the node hands on its first operand. Casts between floating types are the plan's."""
    name = opname(node)
    if name in NOTHING:
        return True
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return False
    before, after = value_of(source), value_of(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if name in CASTS:
        return bool(before.dtype.is_floating_point == after.dtype.is_floating_point)
    if name in ("dropout", "feature_dropout", "native_dropout"):
        return not node.args[1] or not node.args[2]
    if name in ("view", "reshape", "expand", "expand_as", "view_as"):
        return before.shape == after.shape
    if name == "cat":
        return False
    return name == "detach_" and trace.is_constant(node)


def strip(trace: Trace, value: Any) -> Any:
    while isinstance(value, fx.Node) and value.op == "call_function":
        if opname(value) == "cat" and (only := sole_part(trace, value)) is not None:
            value = only
        elif is_identity(trace, value):
            value = value.args[0]
        else:
            break
    return value


def sole_part(trace: Trace, node: fx.Node) -> fx.Node | None:
    """The one operand of a concatenation that is not empty."""
    given: Any = node.args[0]
    parts = [p for p in given if 0 not in shape_of(p)]
    return parts[0] if len(parts) == 1 else None


def call(trace: Trace, value: Any, *names: str) -> fx.Node | None:
    """The node itself, looked through, when it is one of these operators."""
    found = strip(trace, value)
    return found if isinstance(found, fx.Node) and opname(found) in names else None


def scalar(trace: Trace, value: Any) -> float | None:
    """A number: written as one, or a constant with one element."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, fx.Node) and trace.is_constant(value):
        known = value_of(value)
        if isinstance(known, Tensor) and known.numel() == 1:
            return float(trace.constant(value))
    return None


def same(trace: Trace, a: Any, b: Any) -> bool:
    return strip(trace, a) is strip(trace, b)


def with_scalar(trace: Trace, node: fx.Node | None) -> tuple[fx.Node, float] | None:
    """A commutative node of a tensor and a number: (tensor, number)."""
    if node is None:
        return None
    a, b = node.args[:2]
    for x, c in ((a, b), (b, a)):
        number = scalar(trace, c)
        if number is not None and isinstance(x, fx.Node):
            return x, number
    return None


def orders(node: fx.Node) -> list[tuple[Any, Any]]:
    a, b = node.args[:2]
    return [(a, b), (b, a)]


def last_dim(node: fx.Node, dims: Any) -> bool:
    """Whether a reduction runs over the last dimension alone."""
    rank = len(shape_of(node.args[0]))  # type: ignore[arg-type]
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    return dims in ([-1], [rank - 1])


def is_parameter(trace: Trace, value: Any, size: int) -> fx.Node | None:
    found = strip(trace, value)
    if isinstance(found, fx.Node) and found in trace.parameters and shape_of(found) == (size,):
        return found
    return None


def closely(a: float | None, b: float) -> bool:
    return a is not None and abs(a - b) <= 1e-6 * abs(b)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def same_along(value: Tensor, dims: list[int]) -> Tensor | None:
    """The value with these dimensions at index 0, when it is the same along each of them."""
    for dim in dims:
        first = value.narrow(dim, 0, 1)
        if (
            value.shape[dim] > 1
            and value.stride(dim)
            and not torch.equal(value, first.expand_as(value))
        ):
            return None
        value = first
    return value
