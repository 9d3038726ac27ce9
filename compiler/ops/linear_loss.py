"""The last product and the loss as one operator, which has the logits of some rows at a time.

Its forward makes the gradients of both operands, chunk by chunk, as the logits come by: they take
no more operations than whole logits (made again in the backward, they would take a third more), and
what waits for the backward is as large as the hidden states and the weight, however many logits
there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, fx

from llmspec.compiler.ops.linear import linear
from llmspec.compiler.ops.loss import FLOAT32, copied_bytes, cross_entropy, row_statistics
from llmspec.compiler.ops.registry import (
    Entry,
    Kernel,
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
from llmspec.dsl.units import render_bytes

LOGITS_BYTES = 256 * 2**20
"""That a chunk may take, and its gradient in the same place."""
FEWEST_ROWS = 1024
"""Each chunk reads and writes the whole gradient of the weight: with fewer rows that takes longer
than the product it is added by."""
WHOLE_ROWS = 128
"""Rows of a chunk are a multiple of a product's tile."""


def rows_at_once(vocabulary: int, width: int) -> int:
    """Of logits of `vocabulary` columns on one rank, in a type of `width` bytes."""
    fitting = LOGITS_BYTES // (vocabulary * width) // WHOLE_ROWS * WHOLE_ROWS
    return max(FEWEST_ROWS, fitting)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
    """x [B, T, D], weight [V, D], targets [B, T] -> the summed loss of x @ weight.T, a scalar."""
    return cross_entropy(linear(x, weight), targets)


def _rule(node: fx.Node) -> Rule:
    b, t, d = shape_of(node.args[0])  # type: ignore[arg-type]
    return index_rule(
        "b t d, v d, b t ->",
        {"b": b, "t": t, "d": d, "v": shape_of(node.args[1])[0]},  # type: ignore[arg-type]
        whole=frozenset("bd"),
        uneven=frozenset("v"),
        completed=frozenset("v"),
        integer=frozenset({2}),
    )


def _render(node: fx.Node, args: Sequence[str], local: Localised) -> Printed:
    x, weight, targets, rows = args
    if local.factor != "v":
        name, where = "linear_cross_entropy_sum", ""
    else:
        name = "vocabulary_parallel_linear_cross_entropy_sum"
        where = f", whole_vocab={local.whole_operands[1][0]}, axis={local.axis}"
    at_once = min(int(rows), numel(shape_of(node.args[2])))  # type: ignore[arg-type]
    text = f"{name}({x}, {weight}, {targets}{where}, rows={at_once})"
    return Printed(text, (("runtime.linear_loss", name),))


def _sizes(shapes: Shapes) -> tuple[int, int, int]:
    """Rows, vocabulary, width."""
    x, weight, _ = shapes.operands
    return numel(x[:-1]), weight[0], weight[1]


def _flops(node: fx.Node, shapes: Shapes) -> float:
    rows, vocabulary, width = _sizes(shapes)
    return 2.0 * rows * vocabulary * width


def _saved(node: fx.Node, shapes: Shapes) -> Saved:
    """The gradients of x and of the weight."""
    rows, vocabulary, width = _sizes(shapes)
    return Saved(extra_elements=rows * width, weight_elements=vocabulary * width)


def _chunk(node: fx.Node, shapes: Shapes) -> int:
    return min(int(node.args[3]), _sizes(shapes)[0])  # type: ignore[arg-type]


def _numbers(node: fx.Node, shapes: Shapes, width: int) -> tuple[Numbers, ...]:
    rows, vocabulary, _ = _sizes(shapes)
    split = vocabulary < shape_of(node.args[1])[0]  # type: ignore[arg-type]
    return row_statistics(rows, _chunk(node, shapes), width) if split else ()


def _buffers(node: fx.Node, shapes: Shapes, element: int) -> int:
    """The hidden states, which nobody keeps; logits of a chunk, and copies of some of its rows in
    float32; of its hidden states one without what is no target."""
    every, vocabulary, width = _sizes(shapes)
    rows = _chunk(node, shapes)
    copies = copied_bytes(rows, vocabulary, element)
    chunk = element * rows * vocabulary + max(copies, element * rows * width)
    return element * every * width + chunk


def _kernels(
    node: fx.Node, shapes: Shapes, element: int
) -> tuple[Sequence[Kernel], Sequence[Kernel]]:
    rows, vocabulary, width = _sizes(shapes)
    chunk = _chunk(node, shapes)
    count = math.ceil(rows / max(chunk, 1))
    x, weight, logits = chunk * width, vocabulary * width, chunk * vocabulary
    wide = max(element, FLOAT32)
    made = element * (x + weight + logits)
    added = made + element * weight
    # to float32 (where it is not), log-softmax, exponential where the logits were
    softmax = logits * ((element + wide if element < wide else 0) + 3 * wide + element)
    forward = (
        Kernel(moved=made, rows=chunk, columns=vocabulary, depth=width, count=count),
        Kernel(moved=softmax, count=count),
        Kernel(moved=made, rows=chunk, columns=width, depth=vocabulary, count=count),
        Kernel(moved=added, rows=vocabulary, columns=width, depth=chunk, count=count),
        Kernel(moved=4 * element * x, count=count),
    )
    return forward, (Kernel(moved=2 * element * (rows * width + weight), count=1),)


def _remark(node: fx.Node, shapes: Shapes, element: int) -> tuple[str, ...]:
    rows, vocabulary, width = _sizes(shapes)
    chunk = _chunk(node, shapes)
    logits = f"{render_bytes(element * rows * vocabulary)} of logits"
    if chunk < rows:
        logits += f", {render_bytes(element * chunk * vocabulary)} at a time"
    kept = render_bytes(element * (rows + vocabulary) * width)
    return (f"{logits};", f"their gradients are made at once: {kept} wait for the backward")


register(
    Entry(
        name="linear_cross_entropy",
        function=linear_cross_entropy,
        rule=_rule,
        flops=lambda node, shapes: 3 * _flops(node, shapes),
        model_flops=_flops,
        saved=_saved,
        render=_render,
        contraction=True,
        backward_factor=lambda node: 0.0,
        kernels=_kernels,
        buffers=_buffers,
        makes_gradients=True,
        remark=_remark,
        numbers=_numbers,
    )
)
