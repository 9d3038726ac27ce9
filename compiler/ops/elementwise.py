"""Element-wise operators, with NumPy's broadcasting: arithmetic and the activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from llmspec.compiler.ops.formula import Expr, Formula, Gradient, Maker
from llmspec.compiler.ops.registry import (
    Entry,
    Factors,
    Localised,
    Printed,
    Rule,
    Saved,
    Shape,
    late_weight,
    letters,
    numel,
    register,
    shape_of,
    tensor_operands,
)


def add(a: Tensor, b: Tensor | float) -> Tensor:
    return a + b


def subtract(a: Tensor | float, b: Tensor | float) -> Tensor:
    return a - b  # type: ignore[return-value]


def multiply(a: Tensor, b: Tensor | float) -> Tensor:
    return a * b


def divide(a: Tensor | float, b: Tensor | float) -> Tensor:
    return a / b  # type: ignore[return-value]


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def relu(x: Tensor) -> Tensor:
    return F.relu(x)


def silu(x: Tensor) -> Tensor:
    return F.silu(x)


def tanh(x: Tensor) -> Tensor:
    return torch.tanh(x)


def sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x)


def broadcast_dims(shape: Shape, rank: int, names: Sequence[str]) -> tuple[Factors, ...]:
    """The factors of an operand of a broadcast: aligned right, nothing where it is repeated."""
    own = names[rank - len(shape) :]
    return tuple((n,) if size > 1 else ("one",) for n, size in zip(own, shape, strict=True))


def elementwise_rule(node: fx.Node, linear: tuple[tuple[int, ...], ...] = ()) -> Rule:
    """Every dimension may be split but the first (sequences: the data axes' own)."""
    result = shape_of(node)
    names = letters(len(result))
    operands = tuple(broadcast_dims(shape_of(o), len(result), names) for o in tensor_operands(node))
    return Rule(
        operands=operands,
        result=tuple((n,) for n in names),
        sizes=dict(zip(names, result, strict=True)),
        whole=frozenset(names[:1] if len(names) > 1 else ()),
        uneven=frozenset(names[-1:]),
        linear=linear,
    )


def _both(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    return (tuple(range(len(tensor_operands(node)))),)


def _each(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    return tuple((i,) for i in range(len(tensor_operands(node))))


def _numerator(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    return ((0,),) if isinstance(node.args[0], fx.Node) else ()


def _additive(node: fx.Node) -> tuple[tuple[int, ...], ...]:
    """Adding a number is not linear: each rank would add it."""
    return _both(node) if all(isinstance(a, fx.Node) for a in node.args) else ()


def _product_saves(node: fx.Node, _: Any) -> Saved:
    return Saved(operands=(0, 1)) if len(tensor_operands(node)) == 2 else Saved()


Operands = Sequence[Expr]
Gradients = Sequence[Expr | None]


def _add_gradient(node: fx.Node, m: Maker, x: Operands, y: Expr, g: Expr) -> Gradients:
    return g, g


def _subtract_gradient(node: fx.Node, m: Maker, x: Operands, y: Expr, g: Expr) -> Gradients:
    return g, -g


def _multiply_gradient(node: fx.Node, m: Maker, x: Operands, y: Expr, g: Expr) -> Gradients:
    return g * x[1], g * x[0]


def _divide_gradient(node: fx.Node, m: Maker, x: Operands, y: Expr, g: Expr) -> Gradients:
    return g / x[1], -(g * y / x[1])


def _arithmetic(
    name: str,
    function: Callable[..., Any],
    sign: str,
    linear: Callable[[fx.Node], tuple[tuple[int, ...], ...]],
    saved: Callable[[fx.Node, Any], Saved],
    gradient: Gradient,
    joins: Callable[[fx.Node], bool] | None = None,
) -> None:
    def value(node: fx.Node, m: Maker, x: Operands) -> Expr:
        return m.binary(name, x[0], x[1])

    def render(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
        return Printed(f"{args[0]} {sign} {args[1]}")

    register(
        Entry(
            name=name,
            function=function,
            rule=lambda node: elementwise_rule(node, linear(node)),
            flops=lambda node, shapes: float(numel(shapes.result)),
            saved=saved,
            render=render,
            formula=Formula(value=value, gradient=gradient),
            joins=joins,
            hands_on=gradient is _add_gradient,
        )
    )


def _joins_product(node: fx.Node) -> bool:
    """A bias of a product with a weight: `F.linear` takes both."""
    first, second = node.args[0], node.args[1]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return False
    product = late_weight(first) is not None and len(first.users) == 1
    return product and second.op == "get_attr" and len(shape_of(second)) == 1


def _nothing(node: fx.Node, _: Any) -> Saved:
    return Saved()


_arithmetic("add", add, "+", _additive, _nothing, _add_gradient, _joins_product)
_arithmetic("subtract", subtract, "-", _additive, _nothing, _subtract_gradient)
_arithmetic("multiply", multiply, "*", _each, _product_saves, _multiply_gradient)
_arithmetic("divide", divide, "/", _numerator, _product_saves, _divide_gradient)


# --------------------------------------------------------------------------------------------------
# Activations: values, and derivatives at x with the result y


def _gelu_value(m: Maker, x: Expr) -> Expr:
    return x * _normal_below(m, x)


def _gelu_slope(m: Maker, x: Expr, y: Expr) -> Expr:
    density = 0.3989422804014327 * m.apply("exp", -0.5 * x * x)  # 1 / sqrt(2 pi)
    return _normal_below(m, x) + x * density


def _normal_below(m: Maker, x: Expr) -> Expr:
    """The share of a normal distribution that lies below x."""
    return (0.5 * (1 + m.apply("erf", 0.7071067811865476 * x))).named("below")


def _gelu_tanh_value(m: Maker, x: Expr) -> Expr:
    return 0.5 * x * (1 + _gelu_tanh(m, x))


def _gelu_tanh(m: Maker, x: Expr) -> Expr:
    bend = 0.7978845608028654 * (x + 0.044715 * (x * x * x))  # sqrt(2 / pi)
    return m.apply("tanh", bend).named("bend")


def _gelu_tanh_slope(m: Maker, x: Expr, y: Expr) -> Expr:
    t = _gelu_tanh(m, x)
    inner = 0.7978845608028654 * (1 + 0.134145 * (x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner


def _silu_value(m: Maker, x: Expr) -> Expr:
    return x * m.apply("sigmoid", x).named("sigmoid")


def _silu_slope(m: Maker, x: Expr, y: Expr) -> Expr:
    s = m.apply("sigmoid", x)
    return s * (1 + x * (1 - s))


FORMULAS: dict[str, tuple[Callable[[Maker, Expr], Expr], Callable[[Maker, Expr, Expr], Expr]]] = {
    "gelu": (_gelu_value, _gelu_slope),
    "gelu_tanh": (_gelu_tanh_value, _gelu_tanh_slope),
    "relu": (lambda m, x: m.apply("relu", x), lambda m, x, y: m.apply("positive", y)),
    "silu": (_silu_value, _silu_slope),
    "tanh": (lambda m, x: m.apply("tanh", x), lambda m, x, y: 1 - y * y),
    "sigmoid": (lambda m, x: m.apply("sigmoid", x), lambda m, x, y: y * (1 - y)),
}


def _activation(
    function: Callable[[Tensor], Tensor], text: str, operations: int, keeps_result: bool
) -> None:
    value, slope = FORMULAS[function.__name__]

    def gradient(node: fx.Node, m: Maker, x: Operands, y: Expr, g: Expr) -> Gradients:
        return (g * slope(m, x[0], y),)

    def render(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
        return Printed(text.format(args[0]))

    saved = Saved(result=True) if keeps_result else Saved(operands=(0,))
    register(
        Entry(
            name=function.__name__,
            function=function,
            rule=elementwise_rule,
            flops=lambda node, shapes: float(operations * numel(shapes.result)),
            saved=lambda node, shapes: saved,
            render=render,
            formula=Formula(value=lambda node, m, x: value(m, x[0]), gradient=gradient),
        )
    )


_activation(gelu, "F.gelu({})", 8, keeps_result=False)
_activation(gelu_tanh, 'F.gelu({}, approximate="tanh")', 8, keeps_result=False)
_activation(relu, "F.relu({})", 1, keeps_result=True)
_activation(silu, "F.silu({})", 4, keeps_result=False)
_activation(tanh, "torch.tanh({})", 4, keeps_result=True)
_activation(sigmoid, "torch.sigmoid({})", 4, keeps_result=True)
ACTIVATIONS = {f.__name__: f for f in (gelu, gelu_tanh, relu, silu, tanh, sigmoid)}
