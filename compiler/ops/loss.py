"""The loss: the sum over target tokens of the cross entropy, float32 at least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from llmspec.compiler.ops.registry import (
    Entry,
    Localised,
    Numbers,
    Printed,
    Rule,
    Saved,
    Shapes,
    index_rule,
    numel,
    register,
    shape_of,
)
from llmspec.compiler.placement import Collective

FLOAT32 = 4
COPY_BYTES = 32 * 2**20
"""runtime/loss.py's CHUNK_BYTES."""


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
    text = f"{name}({args[0]}, {args[1]}, whole_vocab={vocabulary}, axis={local.axis})"
    return Printed(text, (("runtime.loss", name),))


def _saved(node: fx.Node, shapes: Shapes) -> Saved:
    """The logits (of float32 ones the logarithms of their softmax), and a few numbers a row."""
    return Saved(operands=(0,), extra_bytes=14 * numel(shapes.operands[0][:-1]))


def _numbers(node: fx.Node, shapes: Shapes, width: int) -> tuple[Numbers, ...]:
    logits = shapes.operands[0]
    split = logits[-1] < shape_of(node.args[0])[-1]  # type: ignore[arg-type]
    rows = numel(logits[:-1])
    return row_statistics(rows, rows, width) if split else ()


def row_statistics(rows: int, chunk: int, width: int) -> tuple[Numbers, ...]:
    """Of a split vocabulary, for so many rows at a time: each row's largest logit, then two sums
    (runtime/loss.py)."""
    wide = max(width, FLOAT32)
    sizes = Counter([chunk] * (rows // chunk) + [rows % chunk] * (rows % chunk > 0))
    return tuple(
        Numbers("tensor", Collective.ALL_REDUCE, wide * n * size, count)
        for size, count in sizes.items()
        for n in (1, 2)
    )


def copied_bytes(rows: int, vocabulary: int, width: int) -> int:
    """That the softmax of some rows has at once: of short types a copy and the result in float32,
    else the result."""
    wide = max(width, FLOAT32)
    one = max(wide * vocabulary, min(wide * rows * vocabulary, COPY_BYTES))
    return one if width >= FLOAT32 else 2 * one


def _buffers(node: fx.Node, shapes: Shapes, width: int) -> int:
    """PyTorch's own, which takes float32 and wider types, makes a gradient of the logarithms."""
    b, t, v = shapes.operands[0]
    return width * b * t * v if width >= FLOAT32 else copied_bytes(b * t, v, width)


def _moved(node: fx.Node, shapes: Shapes, width: int, fused: frozenset[str]) -> tuple[float, float]:
    """A log-softmax of a copy in float32; in the backward less the row's sum, exponential, times
    the loss's gradient, each by its kernel (runtime/loss.py). In float32 PyTorch's own kernels move
    18 and 35 bytes a logit (Liger-Kernel's benchmark data, A100)."""
    if "loss" in fused:
        forward, backward = width, 2 * width
    else:
        forward, backward = (18, 35) if width >= FLOAT32 else (14, 20)
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
        buffers=_buffers,
        moved=_moved,
        overwrites="loss",
        numbers=_numbers,
    )
)
