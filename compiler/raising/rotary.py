"""Rotary positions in the ways in which models write them, found from their last step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from llmspec.compiler.ops import elementwise
from llmspec.compiler.ops.attention import rotary
from llmspec.compiler.ops.turn import turn_halves, turn_pairs
from llmspec.compiler.raising.arithmetic import together
from llmspec.compiler.raising.matching import (
    argument,
    call,
    orders,
    same,
    same_along,
    strip,
)
from llmspec.compiler.raising.trace import Trace, opname, shape_of
from llmspec.compiler.raising.unit import UnitRaiser
from llmspec.compiler.raising.views import View, permuted, whole

HEADS_AFTER_TOKENS = (0, 1, 2, 3)
HEADS_BEFORE_TOKENS = (0, 2, 1, 3)


def _half(trace: Trace, value: Any) -> tuple[fx.Node, int] | None:
    """(x, which) of one half of x's last dimension."""
    found = strip(trace, value)
    if not isinstance(found, fx.Node):
        return None
    if opname(found) == "slice":
        x, dim = found.args[0], argument(found, 1, "dim", 0)
        start, stop = argument(found, 2, "start") or 0, argument(found, 3, "end")
        size, rank = shape_of(x)[-1], len(shape_of(x))  # type: ignore[arg-type]
        stop = size if stop is None else min(stop, size)
        start = start if start >= 0 else start + size
        stop = stop if stop >= 0 else stop + size
        if dim not in (-1, rank - 1) or argument(found, 4, "step", 1) != 1:
            return None
        which = {(0, size // 2): 0, (size // 2, size): 1}.get((start, stop))
        return None if which is None else (x, which)  # type: ignore[return-value]
    source = found.args[0] if found.args else None
    if isinstance(source, fx.Node) and opname(source) in ("chunk", "split"):
        x, rank = source.args[0], len(shape_of(source.args[0]))  # type: ignore[arg-type]
        if argument(source, 2, "dim", 0) not in (-1, rank - 1):
            return None
        if shape_of(found)[-1] * 2 == shape_of(x)[-1]:  # type: ignore[arg-type]
            return x, int(found.args[1])  # type: ignore[return-value, arg-type]
    return None


def _turned(trace: Trace, value: Any) -> fx.Node | None:
    """x of cat(-second half, first half)."""
    joined = call(trace, value, "cat")
    if joined is None or len(joined.args[0]) != 2:  # type: ignore[arg-type]
        return None
    minus, first = joined.args[0]  # type: ignore[misc, str-unpack]
    negated = call(trace, minus, "neg")
    high = _half(trace, negated.args[0]) if negated is not None else None
    low = _half(trace, first)
    if high is None or low is None or (high[1], low[1]) != (1, 0):
        return None
    return low[0] if same(trace, high[0], low[0]) else None


def written_turn(r: UnitRaiser, node: fx.Node) -> View | None:
    """The turn of a rotation whose tables are not recognised."""
    source = _turned(r.trace, node)
    if source is None:
        return None
    view = r.focused(r.value(source))
    return replace(view, node=r.emit(turn_halves, view.node, label="turned", at=node))


def _strided(trace: Trace, value: Any) -> tuple[fx.Node, int] | None:
    """(x, which) of every second entry of x's last dimension."""
    found = call(trace, value, "slice")
    if found is None or argument(found, 4, "step", 1) != 2:
        return None
    x = found.args[0]
    size, rank = shape_of(x)[-1], len(shape_of(x))  # type: ignore[arg-type]
    start, stop = argument(found, 2, "start") or 0, argument(found, 3, "end")
    whole_axis = stop is None or stop >= size
    if argument(found, 1, "dim", 0) not in (-1, rank - 1) or start not in (0, 1) or not whole_axis:
        return None
    return x, start  # type: ignore[return-value]


def written_turn_pairs(r: UnitRaiser, node: fx.Node) -> View | None:
    """stack(-odd, even), flattened."""
    pairs = call(r.trace, node.args[0], "stack")
    rank = len(shape_of(node))
    if pairs is None or len(pairs.args[0]) != 2 or len(shape_of(pairs)) != rank + 1:  # type: ignore[arg-type]
        return None
    if (
        argument(pairs, 1, "dim", 0) not in (-1, rank)
        or shape_of(pairs)[:-2] != shape_of(node)[:-1]
    ):
        return None
    minus, even = pairs.args[0]  # type: ignore[misc, str-unpack]
    negated = call(r.trace, minus, "neg")
    high = _strided(r.trace, negated.args[0]) if negated is not None else None
    low = _strided(r.trace, even)
    if high is None or low is None or (high[1], low[1]) != (1, 0):
        return None
    if not same(r.trace, high[0], low[0]):
        return None
    view = r.focused(r.value(strip(r.trace, low[0])))
    return replace(view, node=r.emit(turn_pairs, view.node, label="turned", at=node))


def _table(trace: Trace, node: fx.Node, shape: tuple[int, ...]) -> tuple[Tensor, int] | None:
    """(a constant's [tokens, size], the axis of tokens), laid over a tensor of this shape."""
    value = trace.constant(node)
    value = value.reshape((1,) * (len(shape) - value.dim()) + tuple(value.shape))
    for axis in (1, 2):
        if len(shape) == 4 and value.shape[axis] == shape[axis]:
            others = [d for d in range(3) if d != axis]
            flat = same_along(value, others)
            if flat is not None:
                return flat.reshape(shape[axis], -1), axis
    return None


def rotary_base(cos: Tensor, sin: Tensor) -> float | None:
    """The base whose rotary tables these are: cos and sin [tokens, E / 2], float64."""
    tokens, half = cos.shape
    if tokens < 2 or half < 2:
        return None
    step = torch.atan2(sin[1, 1], cos[1, 1]).item()
    if not 0 < step < 1:
        return None
    base = step ** float(-half)
    base = round(base) if abs(round(base) - base) < 1e-6 * base else base
    steps = float(base) ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float64), steps)
    alike = torch.allclose(angles.cos(), cos, 0, 1e-7) and torch.allclose(
        angles.sin(), sin, 0, 1e-7
    )
    return float(base) if alike else None


def _rotated(
    r: UnitRaiser, at: fx.Node, x: fx.Node, cos: Any, sin: Any, *, halves: bool
) -> View | None:
    """rotary of x, when the constants are rotary tables (of E entries, or of E / 2)."""
    shape = shape_of(x)
    half = shape[-1] // 2
    laid = (*shape[:-1], half) if halves else shape
    first = _table(r.trace, strip(r.trace, cos), laid)
    second = _table(r.trace, strip(r.trace, sin), laid)
    if first is None or second is None or first[1] != second[1]:
        return None
    tables = [t[0] for t in (first, second)]
    if not halves:
        if any(not torch.equal(t[:, :half], t[:, half:]) for t in tables):
            return None
        tables = [t[:, :half] for t in tables]
    base = rotary_base(*tables)
    if base is None:
        return None
    order = HEADS_AFTER_TOKENS if first[1] == 1 else HEADS_BEFORE_TOKENS
    node = r.exact(permuted(r.value(x), order))
    label = node.meta["label"]
    return permuted(whole(r.emit(rotary, node, base, label=label, at=at)), order)


def _constant_factor(trace: Trace, product: fx.Node) -> list[tuple[Any, fx.Node]]:
    return [
        (x, c)
        for x, c in orders(product)
        if isinstance(c, fx.Node) and trace.is_constant(c) and isinstance(x, fx.Node)
    ]


def written_rotary(r: UnitRaiser, node: fx.Node) -> View | None:
    """x · cos + turned(x) · sin."""
    if len(shape_of(node)) != 4:
        return None
    for a, b in orders(node):
        plain, crossed = call(r.trace, a, "mul"), call(r.trace, b, "mul")
        if plain is None or crossed is None:
            return None
        for x, cos in _constant_factor(r.trace, plain):
            for y, sin in _constant_factor(r.trace, crossed):
                source = _turned(r.trace, y)
                if source is not None and same(r.trace, source, x):
                    return _rotated(r, node, strip(r.trace, x), cos, sin, halves=False)
    return None


def _real(table: Tensor) -> Tensor:
    return torch.view_as_real(table)[..., 0].repeat_interleave(2, -1)


def _imaginary(table: Tensor) -> Tensor:
    return torch.view_as_real(table)[..., 1].repeat_interleave(2, -1)


def _complex_pairs(trace: Trace, value: Any) -> fx.Node | None:
    """x of a complex view of neighbouring pairs of x."""
    pairs = call(trace, value, "view_as_complex")
    folded = strip(trace, pairs.args[0]) if pairs is not None else None
    if not isinstance(folded, fx.Node) or opname(folded) not in ("view", "reshape", "unflatten"):
        return None
    x = strip(trace, folded.args[0])
    return x if shape_of(folded) == (*shape_of(x)[:-1], shape_of(x)[-1] // 2, 2) else None


def complex_rotary(r: UnitRaiser, node: fx.Node) -> View | None:
    """Pairs of x times a constant complex table: x · real + turned(x) · imaginary."""
    real = call(r.trace, node.args[0], "view_as_real")
    product = call(r.trace, real.args[0], "mul") if real is not None else None
    for pairs, table in _constant_factor(r.trace, product) if product is not None else ():
        x = _complex_pairs(r.trace, pairs)
        if x is None or shape_of(x) != shape_of(node):
            continue
        view = r.focused(r.value(x))
        turned = replace(view, node=r.emit(turn_pairs, view.node, label="turned", at=node))
        terms = (
            together(r, node, elementwise.multiply, part, whole(r.constant(table, which)))
            for part, which in ((view, _real), (turned, _imaginary))
        )
        return together(r, node, elementwise.add, *terms)
    return None


def _half_product(trace: Trace, value: Any) -> tuple[fx.Node, int, fx.Node] | None:
    """(x, which half, table) of half · table."""
    product = call(trace, value, "mul")
    for x, table in _constant_factor(trace, product) if product is not None else ():
        half = _half(trace, x)
        if half is not None:
            return half[0], half[1], table
    return None


def written_rotary_halves(r: UnitRaiser, node: fx.Node) -> View | None:
    """cat(low · cos - high · sin, high · cos + low · sin)."""
    parts = node.args[0]
    rank = len(shape_of(node))
    if rank != 4 or len(parts) != 2 or argument(node, 1, "dim", 0) not in (-1, rank - 1):  # type: ignore[arg-type]
        return None
    minus, plus = call(r.trace, parts[0], "sub"), call(r.trace, parts[1], "add")  # type: ignore[index]
    if minus is None or plus is None:
        return None
    terms = [_half_product(r.trace, t) for t in (*minus.args[:2], *plus.args[:2])]
    if any(t is None for t in terms):
        return None
    a, b, c, d = terms  # type: ignore[misc]
    c, d = (c, d) if c[1] == 1 else (d, c)  # type: ignore[index]
    halves = [t[1] for t in (a, b, c, d)]  # type: ignore[index]
    xs = {strip(r.trace, t[0]) for t in (a, b, c, d)}  # type: ignore[index]
    tables = [strip(r.trace, t[2]) for t in (a, b, c, d)]  # type: ignore[index]
    alike = _alike(r.trace, tables[0], tables[2]) and _alike(r.trace, tables[1], tables[3])
    if halves != [0, 1, 1, 0] or len(xs) != 1 or not alike:
        return None
    return _rotated(r, node, xs.pop(), tables[0], tables[1], halves=True)


def _alike(trace: Trace, a: fx.Node, b: fx.Node) -> bool:
    return a is b or torch.equal(trace.constant(a), trace.constant(b))
