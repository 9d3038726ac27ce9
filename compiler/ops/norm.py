"""Norms over the last dimension; statistics in float32 at least, the result in the input's type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

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
        )
    )


_register(rms_norm, operations=4, statistics=1)
_register(layer_norm, operations=8, statistics=2)
_register(layer_norm_no_bias, operations=7, statistics=2)
