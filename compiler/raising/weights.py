"""A unit's parameters, and the linear maps that can be made again from a stack or a part of one."""

from __future__ import annotations

import torch
from torch import fx

from llmspec.compiler.graph import Parameter
from llmspec.compiler.ops import elementwise
from llmspec.compiler.ops.linear import linear
from llmspec.compiler.ops.projection import projection
from llmspec.compiler.raising.emitter import WHOLE, Emitter, Form, Linear, identifier
from llmspec.compiler.raising.trace import shape_of
from llmspec.compiler.raising.views import (
    Atom,
    View,
)


class Weights(Emitter):
    # ---------------------------------------------------------------------------- parameters

    def local_path(self, name: str) -> str:
        prefix = f"{self.boundary.prefix}." if self.boundary.prefix else ""
        return name.removeprefix(prefix) if name.startswith(prefix) else name

    def weight(self, name: str, form: Form, *, input_first: bool = False) -> fx.Node:
        """The parameter with this full name, in one form of storage."""
        key = (name, form)
        if key not in self._weights:
            self._weights[key] = self._parameter(name, form, input_first)
        return self._weights[key]

    def _parameter(self, name: str, form: Form, input_first: bool) -> fx.Node:
        tensor = self.trace.module.get_parameter(name)
        sizes = tuple(tensor.shape)
        path, source = self.local_path(name), None
        full = name
        match form:
            case ("stack", int(count)):
                at = 1 if input_first else 0
                sizes = (*sizes[:at], count, sizes[at] // count, *sizes[at + 1 :])
                source = tuple(tensor.shape)
            case ("rows", int(start), int(stop)):
                sizes = (stop - start, *sizes[1:])
                path, full = (f"{n}_rows_{start}_{stop}" for n in (path, name))
        tied = full if name in self.boundary.owners else None
        path = full if tied else path
        weight = Parameter(
            path=path,
            shape=sizes,
            dims="",
            init=self.trace.recording.init(name, tensor),
            decay=tensor.dim() >= 2,
            tied=tied,
            source_shape=source,
        )
        # the same path may stand in the graph in two forms for a while: the builder allows one
        node = self.builder.unit.graph.create_node("get_attr", path, name=path.replace(".", "_"))
        node.meta["parameter"] = weight
        self.names[node] = (name, form)
        label = path.rpartition(".")[2]
        return self.builder._finish(node, torch.empty(sizes, device="meta"), label, "")

    def linear(
        self, x: View, weight: str, bias: str | None, at: fx.Node, *, input_first: bool
    ) -> View:
        """x with its last axis the last dimension of its node."""
        function = projection if input_first else linear
        scope, leaf = self.place(at)
        tensor = self.trace.module.get_parameter(weight)
        out = tensor.shape[1 if input_first else 0]
        vocabulary = at is self.trace.output or out == shape_of(self.trace.output)[-1]
        letter = "V" if vocabulary else "D" if out == self.width else "F"
        dims = (x.node.meta["dims"] or "")[:-1]
        made = Linear(function, x.node, weight, bias, leaf or "y", scope, dims and dims + letter)
        node = self._linear(made, WHOLE, at)
        self.made[node] = made
        last = len(node.meta["shape"]) - 1
        return View(node, (*x.axes[:-1], (Atom(last, 1, out),)))

    def _linear(self, made: Linear, form: Form, at: fx.Node | None) -> fx.Node:
        dims = (
            made.dims
            if form == WHOLE or form[0] == "rows"
            else made.dims and (made.dims[:-1] + "N" + made.dims[-1])
        )
        weight = self.weight(made.weight, form, input_first=made.function is projection)
        before, self.builder._scope = self.builder._scope, made.scope
        label = identifier(made.label)
        node = self.builder.call(made.function, made.x, weight, label=label, dims=dims)
        if made.bias is not None:
            bias = self.weight(made.bias, form)
            node = self.builder.call(elementwise.add, node, bias, label=label, dims=dims)
        self.builder._scope = before
        return node

    def stacked(self, node: fx.Node, count: int) -> fx.Node | None:
        """A linear value whose weight is a stack: […, count, O]; None when that cannot be had."""
        made = self.made.get(node)
        if made is None or made.weight in self.boundary.unsplit:
            return None
        return self.once(("stack", node, count), lambda: self._linear(made, ("stack", count), None))

    def is_parted(self, node: fx.Node) -> bool:
        made = self.made.get(node)
        return made is not None and made.weight in self.boundary.parted - self.boundary.unsplit

    def rows(self, view: View, start: int, stop: int) -> View | None:
        """A part of a linear value's last axis, from a part of its weight that is stored apart."""
        made = self.made.get(view.node)
        last = len(view.node.meta["shape"]) - 1
        size = view.node.meta["shape"][-1]
        if made is None or made.weight in self.boundary.unsplit or made.function is projection:
            return None
        if view.picks or view.axes[-1] != (Atom(last, 1, size),):
            return None
        form: Form = ("rows", start, stop)
        node = self.once(("rows", view.node, start, stop), lambda: self._linear(made, form, None))
        return View(node, (*view.axes[:-1], (Atom(last, 1, stop - start),)))
