"""Helps to write a unit's graph: one call per operator, names and scopes kept along the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from llmspec.compiler.graph import Buffer, Init, Parameter, Unit, meta_dtype, on_meta
from llmspec.compiler.ops.results import result_of
from llmspec.dsl.program import Span


class UnitBuilder:
    """Collects one unit. Values are fx nodes whose shapes are known as soon as they are made."""

    def __init__(self, name: str, span: Span | None = None):
        self.unit = Unit(name=name, graph=fx.Graph(), inputs=(), span=span)
        self._meta: dict[fx.Node, torch.Tensor] = {}
        self._scope: tuple[str, ...] = ()
        self._span = span

    @contextmanager
    def scope(self, name: str, span: Span | None = None) -> Iterator[None]:
        before = self._scope, self._span
        self._scope, self._span = (*self._scope, name), span or self._span
        yield
        self._scope, self._span = before

    def _finish(self, node: fx.Node, value: torch.Tensor, label: str, dims: str) -> fx.Node:
        self._meta[node] = value
        node.meta |= {
            "shape": tuple(value.shape),
            "label": label,
            "dims": dims,
            "scope": self._scope,
            "span": self._span,
            "integer": not value.is_floating_point(),
        }
        return node

    def input(
        self, name: str, shape: tuple[int, ...], dims: str, dtype: torch.dtype | None = None
    ) -> fx.Node:
        node = self.unit.graph.placeholder(name)
        self.unit.inputs = (*self.unit.inputs, name)
        value = torch.empty(shape, dtype=dtype or meta_dtype(name), device="meta")
        return self._finish(node, value, name, dims)

    def parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        dims: str,
        init: Init,
        *,
        decay: bool | None = None,
        tied: str | None = None,
        path: str | None = None,
        picks: int | None = None,
        buffer: Buffer | None = None,
    ) -> fx.Node:
        """A weight of the current scope; the same path twice is the same weight."""
        path = path or ".".join((*self._scope, name))
        known = path in self.unit.parameters
        decay = len(shape) >= 2 if decay is None else decay
        weight = Parameter(
            path=path, shape=shape, dims=dims, init=init, decay=decay, tied=tied, picks=picks,
            buffer=buffer,
        )  # fmt: skip
        self.unit.parameters.setdefault(path, weight)
        if known:
            return next(n for n in self._meta if n.op == "get_attr" and n.target == path)
        node = self.unit.graph.create_node("get_attr", path, name=path.replace(".", "_"))
        node.meta["parameter"] = self.unit.parameters[path]
        return self._finish(node, on_meta(weight), name, dims)

    def call(self, function: Callable[..., Any], *args: Any, label: str, dims: str) -> fx.Node:
        value = result_of(
            function, [self._meta[a] if isinstance(a, fx.Node) else a for a in args]
        )
        name = "_".join((*self._scope, label))
        node = self.unit.graph.create_node("call_function", function, args, name=name)
        return self._finish(node, value, label, dims)

    def finish(self, result: fx.Node) -> Unit:
        self.unit.graph.output(result)
        return self.unit
