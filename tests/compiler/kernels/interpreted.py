"""Kernels of graphs in Triton's interpreter against their plain functions in float64: run as a
program of its own, since the interpreter is chosen before Triton is imported."""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llmspec.compiler.graph import Unit
from llmspec.compiler.kernels.direction import SCALARS, Direction, backward_of, forward_of
from llmspec.compiler.kernels.group import Group
from llmspec.compiler.ops import attention, elementwise, norm, weights
from llmspec.compiler.ops.dropout import dropout
from llmspec.compiler.ops.formula import Expr
from llmspec.compiler.ops.registry import numel
from llmspec.compiler.passes.fuse import fuse_unit
from tests.compiler.kernels.groups import Draft, groups_of, module_of

TOLERANCE = 1e-5
SHAPES = {"odd": (2, 5, 37), "two rows": (1, 2, 130), "many rows": (3, 33, 24)}
DRAWN = {"stream": 1234567, "threshold": -(1 << 62), "raised": 4 / 3}


def residual_rmsnorm(d: Draft) -> Any:
    total = d.call(elementwise.add, d.given(d.shape, "x"), d.given(d.shape, "out"))
    normed = d.call(norm.rms_norm, total, d.weight(d.shape[-1]), 1e-5)
    return d.call(elementwise.multiply, total, d.call(elementwise.gelu_tanh, normed))


def rmsnorm(d: Draft) -> Any:
    return d.call(norm.rms_norm, d.given(d.shape), d.weight(d.shape[-1]), 1e-5)


def layernorm(d: Draft) -> Any:
    weights = [d.weight(d.shape[-1]) for _ in range(2)]
    return d.call(norm.layer_norm, d.given(d.shape), *weights, 1e-5)


def dropout_residual_layernorm(d: Draft) -> Any:
    dropped = d.call(dropout, d.given(d.shape), d.given(d.shape[:1], "samples"), 0.25, 0)
    total = d.call(elementwise.add, d.given(d.shape), dropped)
    weights = [d.weight(d.shape[-1]) for _ in range(2)]
    return d.call(norm.layer_norm, total, *weights, 1e-5)


def silu_gate(d: Draft) -> Any:
    gate = d.call(elementwise.silu, d.given(d.shape))
    return d.call(elementwise.multiply, gate, d.given(d.shape))


def bias_gelu(d: Draft) -> Any:
    biased = d.call(elementwise.add, d.given(d.shape), d.weight(d.shape[-1]))
    return d.call(elementwise.gelu, biased)


def activations(d: Draft) -> Any:
    value = d.given(d.shape)
    for name in ("tanh", "sigmoid", "relu"):
        value = d.call(elementwise.ACTIVATIONS[name], d.call(elementwise.multiply, value, 2.0))
    return d.call(elementwise.divide, value, 3.0)


def repeated(d: Draft) -> Any:
    total = d.call(elementwise.add, d.given(d.shape), d.given(d.shape[1:]))
    return d.call(elementwise.multiply, total, d.given((*d.shape[:-1], 1)))


def rotary(d: Draft) -> Any:
    return d.call(attention.rotary, d.given((2, 3, 5, 6)), 100.0)


def softmax(d: Draft) -> Any:
    return d.call(weights.masked_softmax, d.given((2, 3, 5, 7)), False, None)


def softmax_dropout(d: Draft) -> Any:
    """Attention's weights, written out: of causal scores, dropped."""
    shape = d.shape if len(d.shape) == 4 else (2, 3, 5, 37)
    made = d.call(weights.masked_softmax, d.given(shape), True, None)
    return d.call(dropout, made, d.given(shape[:1], "samples"), 0.25, 0)


def scale_softmax(d: Draft) -> Any:
    scaled = d.call(elementwise.multiply, d.given((2, 3, 5, 37)), 0.125)
    return d.call(weights.masked_softmax, scaled, True, None)


def windowed_softmax(d: Draft) -> Any:
    both = [d.call(weights.masked_softmax, d.given((1, 2, 9, 9)), c, 3) for c in (True, False)]
    return d.call(elementwise.subtract, *both)


def low_softmax(d: Draft) -> Any:
    """Far below 0, where the exponential of what is outside a row is infinite; and a weight, whose
    gradient is summed over all rows of a tile."""
    low = d.call(elementwise.subtract, d.given((2, 3, 5, 7)), 300.0)
    made = d.call(weights.masked_softmax, low, True, None)
    return d.call(elementwise.multiply, made, d.weight(7))


GRAPHS = (
    low_softmax,
    softmax,
    softmax_dropout,
    scale_softmax,
    windowed_softmax,
    rmsnorm,
    layernorm,
    residual_rmsnorm,
    dropout_residual_layernorm,
    silu_gate,
    bias_gelu,
    activations,
    repeated,
    rotary,
)


def arguments(
    one: Direction, group: Group, dtype: torch.dtype, *, empty: bool = False
) -> list[Any]:
    """Random values of what a direction reads; empty: shapes and types alone, on meta."""
    generator = torch.Generator().manual_seed(11)
    out: list[Any] = []
    for _, e in one.reads:
        shape, integer = shape_read(one, e), one.integer(e)
        wide = (
            torch.float32
            if not e.columns
            or (one.input_of(e) is not None and (one.input_of(e).extra is not None))
            else dtype
        )
        if empty:
            out.append(torch.empty(shape, dtype=torch.int64 if integer else wide, device="meta"))
        elif integer:
            places = e.label == "places"
            out.append(torch.arange(shape[0]) * (group.columns if places else 1))
        else:
            made = torch.randn(shape, generator=generator, dtype=torch.float64)
            out.append((made if e.columns else made + 2.0).to(dtype))
    return out + [DRAWN[n] for n in one.scalars]


def shape_read(one: Direction, e: Expr) -> tuple[int, ...]:
    found, whole = one.input_of(e), one.group.whole
    if found is not None and found.node is not None:
        return found.node.meta["shape"]
    if found is not None and found.extra is not None:
        first, stop = found.extra.per
        if found.integer:
            return (numel(whole[first:stop]),)
        return (*whole[first:stop], *[1] * (len(whole) - 1 - stop), whole[-1])
    return (*whole[:-1], whole[-1] if e.columns else 1)


def directions(group: Group) -> Iterator[Direction]:
    yield forward_of(group)
    if (backward := backward_of(group)) is not None:
        yield backward


def compare(module: ModuleType, group: Group) -> float:
    """The largest error of both directions, relative to the largest number there is."""
    worst = 0.0
    for one in directions(group):
        given = arguments(one, group, torch.float32)
        exact = [
            a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in given
        ]
        ours = getattr(module, f"{one.name}_triton")(*given)
        theirs = getattr(module, f"{one.name}_plain")(*exact)
        pairs = zip(_all(ours), _all(theirs), strict=True)
        for made, wanted in pairs:
            assert made.shape == wanted.shape, (one.name, made.shape, wanted.shape)
            error = (made.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)
            assert error <= TOLERANCE, f"{one.name}: {error:.2g}"
            worst = max(worst, float(error))
    return worst


def _all(results: Any) -> list[Tensor]:
    return list(results) if isinstance(results, tuple) else [results]


def check_unit(unit: Unit) -> dict[str, float]:
    fused = fuse_unit(unit)
    groups = groups_of(fused)
    module = module_of(fused)
    return {name: compare(module, group) for name, group in groups.items()}


def main() -> None:
    assert SCALARS.keys() == DRAWN.keys()
    found: dict[str, float] = {}
    for graph in GRAPHS:
        for words, shape in SHAPES.items():
            draft = Draft(shape)
            made = check_unit(draft.unit(graph(draft)))
            assert made, f"{graph.__name__} ({words}) has no kernel"
            for name, error in made.items():
                found[name] = max(error, found.get(name, 0.0))
    for name, error in found.items():
        print(f"{name} {error:.2e}")


if __name__ == "__main__":
    sys.exit(main())
