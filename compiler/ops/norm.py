"""Norms over the last dimension; statistics in float32 at least, the result in the input's type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from llmspec.compiler.ops.formula import Expr, Formula, Maker
from llmspec.compiler.ops.registry import (
    Entry,
    Localised,
    Printed,
    Rule,
    Saved,
    Shapes,
    index_rule,
    letters,
    numel,
    register,
    shape_of,
    tensor_operands,
)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x […, D], weight [D] -> […, D]."""
    wide = x if x.dtype == torch.float64 else x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x […, D], weight and bias [D] -> […, D]."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def layer_norm_no_bias(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x […, D], weight [D] -> […, D]."""
    return F.layer_norm(x, x.shape[-1:], weight, None, eps)


# --------------------------------------------------------------------------------------------------
# Inside a kernel: the row's statistics, then the norm and its gradient


def _scale(m: Maker, x: Expr, eps: Expr) -> Expr:
    return m.apply("rsqrt", m.row_mean(x * x) + eps).named("scale")


def _centred(m: Maker, x: Expr) -> Expr:
    return (x - m.row_mean(x).named("mean")).named("centred")


def _unit(m: Maker, x: Expr, eps: Expr) -> Expr:
    return (x * _scale(m, x, eps)).named("unit")


def _rms_value(node: fx.Node, m: Maker, x: Sequence[Expr]) -> Expr:
    return _unit(m, x[0], x[2]) * x[1]


def _rms_gradient(
    node: fx.Node, m: Maker, x: Sequence[Expr], y: Expr, g: Expr
) -> Sequence[Expr | None]:
    unit, inner = _unit(m, x[0], x[2]), (g * x[1]).named("inner")
    along = m.row_mean(inner * unit).named("along")
    return (inner - unit * along) * _scale(m, x[0], x[2]), g * unit


def _layer_value(node: fx.Node, m: Maker, x: Sequence[Expr]) -> Expr:
    scaled = _unit(m, _centred(m, x[0]), x[-1]) * x[1]
    return scaled + x[2] if len(x) == 4 else scaled


def _layer_gradient(
    node: fx.Node, m: Maker, x: Sequence[Expr], y: Expr, g: Expr
) -> Sequence[Expr | None]:
    centred = _centred(m, x[0])
    unit, inner = _unit(m, centred, x[-1]), (g * x[1]).named("inner")
    level, along = m.row_mean(inner).named("level"), m.row_mean(inner * unit).named("along")
    of_x = (inner - level - unit * along) * _scale(m, centred, x[-1])
    return (of_x, g * unit, g) if len(x) == 4 else (of_x, g * unit)


RMS = Formula(value=_rms_value, gradient=_rms_gradient)
LAYER = Formula(value=_layer_value, gradient=_layer_gradient)


def _rule(node: fx.Node) -> Rule:
    x = shape_of(node)
    lead = letters(len(x) - 1, skip="d")
    vectors = ", d" * (len(tensor_operands(node)) - 1)
    sizes = dict(zip([*lead, "d"], x, strict=True))
    dims = " ".join([*lead, "d"])
    return index_rule(f"{dims}{vectors} -> {dims}", sizes, whole=frozenset({lead[0], "d"}))


def _register(function, operations: int, statistics: int) -> None:  # type: ignore[no-untyped-def]
    name = function.__name__
    printed = "layer_norm" if name == "layer_norm_no_bias" else name

    def saved(node: fx.Node, shapes: Shapes) -> Saved:
        rows = numel(shapes.result[:-1])
        return Saved(operands=(0,), extra_bytes=4 * statistics * rows)

    def render(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
        tensors = list(args[:-1])
        if name == "layer_norm_no_bias":
            tensors.append("None")
        text = f"{printed}({', '.join(tensors)}, eps={args[-1]})"
        return Printed(text, (("runtime.norms", printed),))

    def moved(
        node: fx.Node, shapes: Shapes, width: int, fused: frozenset[str]
    ) -> tuple[float, float]:
        """PyTorch's kernels reach half of the bandwidth forward and a third backward: layer norms
        on A100 (Liger-Kernel's benchmark data) and V100 (Aceso's profiles)."""
        forward, backward = (2, 3) if "norm" in fused else (3.5, 8)
        elements = numel(shapes.result)
        return forward * width * elements, backward * width * elements

    register(
        Entry(
            name=name,
            function=function,
            rule=_rule,
            flops=lambda node, shapes: float(operations * numel(shapes.result)),
            saved=saved,
            render=render,
            moved=moved,
            formula=RMS if name == "rms_norm" else LAYER,
        )
    )


_register(rms_norm, operations=4, statistics=1)
_register(layer_norm, operations=8, statistics=2)
_register(layer_norm_no_bias, operations=7, statistics=2)
