"""The loss: the sum over target tokens of the cross entropy, float32 at least."""

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
    numel,
    register,
    shape_of,
)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """logits [B, T, V], targets [B, T] (-100: not a target) -> their summed loss, a scalar."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="sum")


def _rule(node: fx.Node) -> Rule:
    b, t, v = shape_of(node.args[0])  # type: ignore[arg-type]
    return index_rule(
        "b t v, b t ->",
        {"b": b, "t": t, "v": v},
        whole=frozenset("b"),
        uneven=frozenset("v"),
        completed=frozenset("v"),
        integer=frozenset({1}),
    )


def _render(node: fx.Node, args: Sequence[str], local: Localised) -> Printed:
    if local.factor != "v":
        text = f"cross_entropy_sum({args[0]}, {args[1]})"
        return Printed(text, (("runtime.loss", "cross_entropy_sum"),))
    name = "vocabulary_parallel_cross_entropy_sum"
    vocabulary = local.whole_operands[0][-1]
    text = f"{name}({args[0]}, {args[1]}, {vocabulary}, {local.axis})"
    return Printed(text, (("runtime.loss", name),))


def _saved(node: fx.Node, shapes: Shapes) -> Saved:
    """The logits (their logarithms of softmax in float32), and a few numbers a row."""
    return Saved(operands=(0,), extra_bytes=6 * numel(shapes.operands[0][:-1]))


def _moved(node: fx.Node, shapes: Shapes, width: int, fused: frozenset[str]) -> tuple[float, float]:
    """Logits are copied to float32, shifted, exponentiated and summed, each by its kernel, and
    again in the backward (runtime/loss.py). In float32 PyTorch's own kernels move 18 and 35 bytes
    a logit (Liger-Kernel's benchmark data, A100)."""
    if "loss" in fused:
        forward, backward = width, 2 * width
    else:
        forward, backward = (18, 35) if width == 4 else (28, 36)
    logits = numel(shapes.operands[0])
    return float(forward * logits), float(backward * logits)


register(
    Entry(
        name="cross_entropy",
        function=cross_entropy,
        rule=_rule,
        flops=lambda node, shapes: 5.0 * numel(shapes.operands[0]),
        saved=_saved,
        render=_render,
        moved=_moved,
    )
)
