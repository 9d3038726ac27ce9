"""Writes a unit's graph node by node, under the names of the user's own modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from llmspec.compiler.build.builder import UnitBuilder
from llmspec.compiler.ops.opaque import Call, Device, Floating, Slot, opaque
from llmspec.compiler.raising.trace import Trace, module_path, shape_of
from llmspec.compiler.raising.views import (
    View,
    whole,
)

Form = tuple[str | int, ...]
"""How a parameter is stored: ("whole",), ("stack", n) or ("rows", start, stop)."""

WHOLE: Form = ("whole",)
NO_END = 2**63 - 1
"""How PyTorch writes a slice without an end."""


@dataclass(frozen=True, slots=True)
class Linear:
    """What made a linear value: it can be made again from a stack or a part of its weight."""

    function: Callable[..., Any]
    x: fx.Node
    weight: str
    bias: str | None
    label: str
    scope: tuple[str, ...]
    dims: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """Where a unit lies in the trace.

    prefix: of its instances' parameters. input: the traced value that flows in, `input_name`.
    owners: full names of parameters that an earlier unit owns.
    parted: parameters stored in parts of different size. unsplit: parameters kept whole.
    """

    prefix: str
    input: fx.Node
    output: fx.Node
    input_name: str
    owners: frozenset[str]
    sequences: int
    parted: frozenset[str] = frozenset()
    unsplit: frozenset[str] = frozenset()


class Emitter:
    """values: of traced nodes that are raised. names: parameters' nodes -> (full name, form)."""

    def __init__(self, trace: Trace, name: str, boundary: Boundary, width: int):
        self.trace, self.boundary, self.width = trace, boundary, width
        self.builder = UnitBuilder(name)
        self.values: dict[fx.Node, View] = {}
        self.made: dict[fx.Node, Linear] = {}
        self.names: dict[fx.Node, tuple[str, Form]] = {}
        self.fixed: set[fx.Node] = set()
        self._weights: dict[tuple[str, Form], fx.Node] = {}
        self._memo: dict[Any, fx.Node] = {}
        rank = len(shape_of(boundary.input))
        dims = "BT" if rank == 2 else "BTD"
        node = self.builder.input(boundary.input_name, shape_of(boundary.input), dims)
        self.input = node
        self.values[boundary.input] = whole(node)

    # ---------------------------------------------------------------------------- emission

    def place(self, node: fx.Node | None) -> tuple[tuple[str, ...], str]:
        """(scope, label) of what a traced node becomes; the label: a leaf module's name, or ""."""
        if node is None:
            return (), ""
        path = module_path(node)
        prefix = self.boundary.prefix
        own = path.removeprefix(prefix).removeprefix(".") if path.startswith(prefix) else path
        parts = tuple(p for p in own.split("@")[0].split(".") if p)
        try:
            leaf = not any(True for _ in self.trace.module.get_submodule(path).children())
        except AttributeError:
            leaf = False
        return (parts[:-1], parts[-1]) if parts and leaf else (parts, "")

    def emit(
        self,
        function: Callable[..., Any],
        *args: Any,
        label: str,
        at: fx.Node | None = None,
        dims: str | None = None,
    ) -> fx.Node:
        scope, leaf = self.place(at)
        name = leaf or label
        lead = next((a for a in args if isinstance(a, fx.Node)), None)
        dims = dims if dims is not None else (lead.meta["dims"] if lead is not None else "")
        before = self.builder._scope
        self.builder._scope = scope
        try:
            node = self.builder.call(function, *args, label=identifier(name), dims=dims)
        finally:
            self.builder._scope = before
        if len(dims) != len(node.meta["shape"]):
            node.meta["dims"] = ""
        return node

    def once(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    # ---------------------------------------------------------------------------- opaque

    def aten(
        self,
        target: str,
        args: Sequence[Any],
        at: fx.Node | None = None,
        options: dict[str, Any] | None = None,
        index: int | None = None,
        donor: fx.Node | None = None,
    ) -> fx.Node:
        """An opaque node; fx nodes among the arguments become its operands.

        donor: for a constant, the operand that says type and device.
        """
        operands: list[fx.Node] = [donor] if donor is not None else []

        def template(value: Any) -> Any:
            match value:
                case fx.Node():
                    if value not in operands:
                        operands.append(value)
                    return Slot(operands.index(value))
                case list() | tuple():
                    return tuple(template(v) for v in value)
                case torch.dtype() if value.is_floating_point:
                    return Floating()
                case torch.device():
                    return Device()
                case int() if value == NO_END:
                    return None
                case _:
                    return value

        packed = tuple(template(a) for a in args)
        named = tuple((k, template(v)) for k, v in (options or {}).items() if v is not None)
        if not operands:
            operands.append(self.input)  # says which device
        integer = tuple(
            i for i, o in enumerate(operands) if not self.builder._meta[o].is_floating_point()
        )
        inner = bool(operands) and all(o in self.fixed for o in operands)
        call = Call(
            target=target,
            args=packed,
            options=named,
            index=index,
            integer=integer,
            fixed=donor is not None or inner,
        )
        # never the operator's own name: emitted code calls functions by such names
        what = target.partition(".")[0].strip("_")
        label = "table" if call.fixed else f"{what}_out"
        key = ("aten", tuple(operands), repr(call))
        node = self.once(
            key, lambda: self.emit(opaque, *operands, call, label=label, at=at, dims="")
        )
        if call.fixed:
            self.fixed.add(node)
        return node

    def is_floating(self, node: fx.Node) -> bool:
        return self.builder._meta[node].is_floating_point()


def identifier(name: str) -> str:
    return f"n{name}" if name[:1].isdigit() else name
