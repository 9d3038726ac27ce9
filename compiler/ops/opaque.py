"""Operators taken over from PyTorch as they stand: whole on every tensor rank, and correct."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from llmspec.compiler.ops.registry import (
    Entry,
    Localised,
    Printed,
    Rule,
    Saved,
    Shapes,
    numel,
    register,
    shape_of,
    tensor_operands,
)


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of the tensor operand with this number among a call's arguments."""

    index: int


@dataclass(frozen=True, slots=True)
class Floating:
    """A floating type that the model names. Types are the plan's: float32, or wider where the first
    operand is wider.
    """


@dataclass(frozen=True, slots=True)
class Device:
    """The first operand's device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What an opaque node calls, its tensors apart.

    target: an aten operator (`cat.default`).
    args, options: with Slot, Floating and Device in place of what only a run knows.
    index: which result is meant, of several. integer: operands without gradient.
    fixed: a constant, computed again; its first operand only says type and device.
    """

    target: str
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()
    index: int | None = None
    integer: tuple[int, ...] = ()
    fixed: bool = False

    def function(self) -> Any:
        packet, _, overload = self.target.partition(".")
        return getattr(getattr(torch.ops.aten, packet), overload)


def _floating(tensors: Sequence[Tensor]) -> torch.dtype:
    wide = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    match value:
        case Slot(index=index):
            return tensors[index]
        case Floating():
            return _floating(tensors)
        case Device():
            return tensors[0].device
        case tuple():
            return [_filled(v, tensors) for v in value]
        case _:
            return value


def opaque(*operands: Tensor | Call) -> Tensor:
    """Runs the call (the last operand) on the tensors before it."""
    *tensors, call = operands
    assert isinstance(call, Call), "an opaque node ends with its call"
    options = {name: _filled(value, tensors) for name, value in call.options}  # type: ignore[arg-type]
    args = [_filled(value, tensors) for value in call.args]  # type: ignore[arg-type]
    result = call.function()(*args, **options)
    return result if call.index is None else result[call.index]


def _printed(value: Any, names: Sequence[str]) -> str:
    match value:
        case Slot(index=index):
            return names[index]
        case Floating():
            if not names:
                return "torch.float32"
            return f"torch.promote_types({names[0]}.dtype, torch.float32)"
        case Device():
            return f"{names[0]}.device"
        case tuple():
            return f"[{', '.join(_printed(v, names) for v in value)}]"
        case float() if value != value or value in (float("inf"), float("-inf")):
            return f'float("{value}")'
        case _:
            return repr(value)


def _render(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    call = node.args[-1]
    assert isinstance(call, Call), "an opaque node ends with its call"
    parts = [_printed(value, args) for value in call.args]
    parts += [f"{name}={_printed(value, args)}" for name, value in call.options]
    text = f"torch.ops.aten.{call.target}({', '.join(parts)})"
    return Printed(text if call.index is None else f"{text}[{call.index}]")


def _rule(node: fx.Node) -> Rule:
    """No factor is split: only whole, or whole with a gradient that is summed elsewhere."""
    call = node.args[-1]
    assert isinstance(call, Call), "an opaque node ends with its call"
    sizes: dict[str, int] = {}

    def dims(prefix: str, shape: tuple[int, ...]) -> tuple[tuple[str], ...]:
        sizes.update({f"{prefix}{i}": size for i, size in enumerate(shape)})
        return tuple((f"{prefix}{i}",) for i in range(len(shape)))

    operands = tuple(
        dims(f"{chr(97 + i % 26)}{i // 26}_", shape_of(o))
        for i, o in enumerate(tensor_operands(node))
    )
    result = dims("result", shape_of(node))
    return Rule(
        operands=operands,
        result=result,
        sizes=sizes,
        whole=frozenset(sizes),
        integer=frozenset(call.integer),
    )


def _saved(node: fx.Node, shapes: Shapes) -> Saved:
    call = node.args[-1]
    assert isinstance(call, Call), "an opaque node ends with its call"
    if call.fixed:
        return Saved()
    kept = (i for i in range(len(shapes.operands)) if i not in call.integer)
    return Saved(operands=tuple(kept), result=True)


PRODUCTS = ("matmul.default", "bmm.default", "mm.default")


def _flops(node: fx.Node, shapes: Shapes) -> float:
    call = node.args[-1]
    assert isinstance(call, Call), "an opaque node ends with its call"
    if call.target in PRODUCTS:
        return 2.0 * numel(shapes.result) * shapes.operands[0][-1]
    return float(numel(shapes.result))


register(
    Entry(name="opaque", function=opaque, rule=_rule, flops=_flops, saved=_saved, render=_render)
)
