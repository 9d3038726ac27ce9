"""Attention and rotary positions, on tensors laid out [sequences, tokens, heads, head size]."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx

from llmspec.compiler.ops.formula import Expr, Extra, Formula, Given, Maker
from llmspec.compiler.ops.registry import (
    Entry,
    Localised,
    Printed,
    Rule,
    Saved,
    Shape,
    Shapes,
    Tiled,
    index_rule,
    numel,
    register,
    shape_of,
)
from llmspec.dsl.units import render_bytes


def rotary(x: Tensor, base: float) -> Tensor:
    """Rotate halves of the head size by position: x [B, T, H, E] -> the same shape.

    Source: Su et al. 2021 (RoFormer), in the half-split layout of Llama.
    """
    size = x.shape[-1]
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = torch.arange(0, size, 2, device=x.device, dtype=kind) / size
    angles = torch.outer(torch.arange(x.shape[1], device=x.device, dtype=kind), base**-steps)
    cos, sin = (torch.cat([f, f], -1)[:, None] for f in (angles.cos(), angles.sin()))
    low, high = x.chunk(2, -1)
    turned = torch.cat([-high, low], -1)
    return (x * cos + turned * sin).to(x.dtype)


def mask(tokens: int, keys: int, causal: bool, window: int | None, device: torch.device) -> Tensor:
    """True where query token t may look at key s: [T, S]."""
    t = torch.arange(tokens, device=device)[:, None] + (keys - tokens)
    s = torch.arange(keys, device=device)[None]
    seen = torch.ones(tokens, keys, dtype=torch.bool, device=device)
    if causal:
        seen = seen & (s <= t)
    if window is not None:
        seen = seen & (t - s < window) & (s - t < window)
    return seen


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, explicit: bool
) -> Tensor:
    """q [B, T, H, E], k [B, S, K, E], v [B, S, K, V] with K dividing H -> [B, T, H, V]. Scaled by
    1/sqrt(E).

    `explicit` asks the emitted program to write the square out; the meaning is the same.
    """
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    seen = mask(q.shape[1], k.shape[2], causal, window, q.device)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    weights = wide.masked_fill(~seen, float("-inf")).softmax(-1).to(q.dtype)
    return (weights @ v).transpose(1, 2)


def key_heads(calls: Iterable[fx.Node]) -> list[int]:
    """Key/value heads of each attention among them."""
    return [shape_of(call.args[1])[2] for call in calls if call.target is attention]  # type: ignore[arg-type]


def _attention_rule(node: fx.Node) -> Rule:
    (b, t, h, e), (_, s, k, _), (*_, v) = (shape_of(a) for a in node.args[:3])  # type: ignore[arg-type]
    sizes = {"b": b, "t": t, "s": s, "k": k, "g": h // k, "e": e, "v": v}
    return index_rule(
        "b t (k g) e, b s k e, b s k v -> b t (k g) v",
        sizes,
        whole=frozenset("btsev"),
        linear=((2,),),
    )


def square_flops(shapes: Shapes) -> float:
    """Of the two products over the whole square: with the keys, and with the values."""
    b, t, h, e = shapes.operands[0]
    return 2.0 * b * t * shapes.operands[1][1] * h * (e + shapes.operands[2][3])


def _attention_flops(node: fx.Node, shapes: Shapes) -> float:
    full = square_flops(shapes)
    return full if node.args[5] else full * seen_share(node, shapes)


def seen_share(node: fx.Node, shapes: Shapes) -> float:
    t, s = shapes.operands[0][1], shapes.operands[1][1]
    return visible_share(t, s, cast(bool, node.args[3]), cast(int | None, node.args[4]))


def visible_share(t: int, s: int, causal: bool, window: int | None) -> float:
    """The share of the square that is looked at: one half when causal (by convention), a band
    with a window.
    """
    share = 0.5 if causal else 1.0
    if window is not None and window < s:
        band = min(1.0, window / s) * (1.0 if causal else 2.0)
        share = min(share, band if t > 1 else 1.0)
    return share


def _model_flops(node: fx.Node, shapes: Shapes) -> float:
    return square_flops(shapes) * seen_share(node, shapes)


def kernel_saved(shapes: Shapes) -> Saved:
    """q, k, v, the result and a logarithm a row. Heads of another size than the widest are filled
    up with zeros, in copies; what is returned of a filled result is kept by whoever reads it."""
    (b, t, h, e), (_, s, k, _), (*_, v) = shapes.operands
    if e == v:
        return Saved(operands=(0, 1, 2), result=True, extra_bytes=4 * b * t * h)
    if v < e:
        filled = e * (b * s * k + b * t * h)
        return Saved(operands=(0, 1), extra_elements=filled, extra_bytes=4 * b * t * h)
    filled = v * (b * s * k + b * t * h)
    return Saved(operands=(2,), result=True, extra_elements=filled, extra_bytes=4 * b * t * h)


def any_heads_saved(node: fx.Node, shapes: Shapes) -> Saved:
    """Of a kernel that takes values of another size than keys."""
    b, t, h, _ = shapes.operands[0]
    if node.args[5] or shapes.operands[0][-1] == shapes.operands[2][-1]:
        return _attention_saved(node, shapes)
    return Saved(operands=(0, 1, 2), result=True, extra_bytes=4 * b * t * h)


def _attention_saved(node: fx.Node, shapes: Shapes) -> Saved:
    b, t, h, _ = shapes.operands[0]
    if not node.args[5]:
        windowed = has_mask(shapes, cast(int | None, node.args[4]))
        return masked_saved(shapes) if windowed else kernel_saved(shapes)
    square = b * h * t * shapes.operands[1][1]
    if h == shapes.operands[1][2]:
        return Saved(operands=(0, 1, 2), extra_elements=square)
    return Saved(operands=(0,), extra_elements=square + sum(map(repeated(h), shapes.operands[1:])))


def repeated(heads: int) -> Callable[[Shape], int]:
    """Elements of keys or values [B, S, K, E] that are repeated for so many query heads."""
    return lambda shape: heads * (numel(shape) // shape[2])


def has_mask(shapes: Shapes, window: int | None) -> bool:
    """Whether a mask says what is seen, which is not for flash attention."""
    return window is not None and window < shapes.operands[1][1]


def masked_saved(shapes: Shapes) -> Saved:
    """As `kernel_saved`, of the memory-efficient kernel (runtime/attention.py): shared keys and
    values are repeated for every head, and PyTorch makes numbers of the mask."""
    (b, t, h, e), (_, s, k, _), (*_, v) = shapes.operands
    wide = kernel_saved(Shapes(((b, t, h, e), (b, s, h, e), (b, s, h, v)), shapes.result))
    copies, kept = t * s, wide.operands
    if h != k:
        copies += b * s * h * ((1 in kept) * e + (2 in kept) * v)
        kept = tuple(i for i in kept if i == 0)
    return replace(wide, operands=kept, extra_elements=wide.extra_elements + copies)


def _remark(node: fx.Node, shapes: Shapes, width: int) -> tuple[str, ...]:
    if node.args[5] or not has_mask(shapes, cast(int | None, node.args[4])):
        return ()
    (b, t, h, e), (_, s, k, _), (*_, v) = shapes.operands
    lines = [
        "a window is a mask, which flash attention does not take; the memory-efficient kernel",
        f"does: {render_bytes(width * t * s)} of numbers",
    ]
    if h != k:
        lines[1] += f", and {render_bytes(width * b * s * h * (e + v))} of keys and values"
        lines.append(f"that are repeated from {k} to {h} heads")
    return tuple(lines)


QUERIES = 128
"""Of one block of a fused kernel."""


def tiled(shapes: Shapes, flops: float) -> Tiled:
    """Of a fused kernel: the keys that each query sees are what its operations say."""
    b, t, h, e = shapes.operands[0]
    of_a_key = 2.0 * b * t * h * (e + shapes.operands[2][3])
    return Tiled(blocks=b * h * max(1.0, t / QUERIES), depth=flops / of_a_key)


def _tiled(node: fx.Node, shapes: Shapes) -> Tiled | None:
    return None if node.args[5] else tiled(shapes, _attention_flops(node, shapes))


def _attention_moved(
    node: fx.Node, shapes: Shapes, width: int, fused: frozenset[str]
) -> tuple[float, float]:
    """Written out, the square is masked, then normalised; one kernel for both reads scores and
    writes weights."""
    operands = width * sum(numel(s) for s in shapes.operands)
    result = width * numel(shapes.result)
    b, t, h, _ = shapes.operands[0]
    if not node.args[5]:
        statistics = 4 * b * t * h
        return operands + result + statistics, 2 * (operands + result) + 2 * statistics
    square = b * h * t * shapes.operands[1][1]
    forward, backward = (4, 7) if "softmax" in fused else (6, 9)
    return (
        operands + result + forward * width * square,
        2 * (operands + result) + backward * width * square,
    )


def _render_attention(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    _q, _k, _v, causal, window, explicit = node.args
    name = "explicit_attention" if explicit else "attention"
    options = ", causal=True" if causal else ", causal=False"
    options += f", window={window}" if window is not None else ""
    return Printed(f"{name}({', '.join(args[:3])}{options})", (("runtime.attention", name),))


register(
    Entry(
        name="attention",
        function=attention,
        rule=_attention_rule,
        flops=_attention_flops,
        saved=_attention_saved,
        lean=("heads", any_heads_saved),
        render=_render_attention,
        contraction=True,
        # a kernel makes five products for the forward's two, the scores again among them (Dao 2023,
        # FlashAttention-2, 3.2); written out they are kept
        backward_factor=lambda node: 2.0 if node.args[5] else 2.5,
        model_flops=_model_flops,
        moved=_attention_moved,
        tiled=_tiled,
        remark=_remark,
    )
)


def turning(context: str = "") -> Formula:
    """Rotary positions: halves turned by a table's angles. context: of the tables' call."""

    def value(node: fx.Node, m: Maker, x: Sequence[Expr]) -> Expr:
        *_, cos, sin = x
        return x[0] * cos + m.turn(x[0]) * sin

    def gradient(
        node: fx.Node, m: Maker, x: Sequence[Expr], y: Expr, g: Expr
    ) -> Sequence[Expr | None]:
        *_, cos, sin = x
        return (g * cos - m.turn(g) * sin,)  # the rotation back

    def given(node: fx.Node, args: Sequence[str], _: Localised) -> Given:
        text = f"*rotary_tables({args[0]}, {args[1]}{context})"
        return Given((text,), (("runtime.rotary", "rotary_tables"),))

    tables = tuple(Extra(name=name, per=(1, 2), columns=True) for name in ("cos", "sin"))
    return Formula(
        value=value, gradient=gradient, extras=lambda node: tables, given=given, alone=True
    )


def _rotary_rule(node: fx.Node) -> Rule:
    b, t, h, e = shape_of(node)
    sizes = {"b": b, "t": t, "h": h, "e": e}
    return index_rule("b t h e -> b t h e", sizes, whole=frozenset("bte"), linear=((0,),))


def _rotary_moved(
    node: fx.Node, shapes: Shapes, width: int, fused: frozenset[str]
) -> tuple[float, float]:
    """x times cosines in float32, two halves added to, and narrow again."""
    chain = 3 * width + (2 * width if width == 4 else 16)
    spent = float(numel(shapes.result) * (2 * width if "rotary" in fused else chain))
    return spent, spent


def _render_rotary(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    return Printed(f"rotary({args[0]}, base={args[1]})", (("runtime.rotary", "rotary"),))


register(
    Entry(
        name="rotary",
        function=rotary,
        rule=_rotary_rule,
        flops=lambda node, shapes: 6.0 * numel(shapes.result),
        saved=lambda node, shapes: Saved(),
        render=_render_rotary,
        moved=_rotary_moved,
        formula=turning(),
    )
)
