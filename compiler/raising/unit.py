"""One unit of a traced model in the dialect: values on demand, from its result backwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from llmspec.compiler.errors import Unsupported
from llmspec.compiler.graph import Unit
from llmspec.compiler.ops.dropout import dropout
from llmspec.compiler.ops.opaque import opaque
from llmspec.compiler.raising import functional
from llmspec.compiler.raising.emitter import WHOLE, Boundary, Form
from llmspec.compiler.raising.layout import Layout
from llmspec.compiler.raising.tidy import name_heads, parameter_letters, tidied
from llmspec.compiler.raising.trace import Trace, module_path, opname, shape_of
from llmspec.compiler.raising.views import (
    View,
    whole,
)


class UnitRaiser(Layout):
    def __init__(self, trace: Trace, name: str, boundary: Boundary, table: Table, width: int):
        super().__init__(trace, name, boundary, width)
        self.table = table
        self.dropout = False
        self._samples: fx.Node | None = None
        self._count = 0
        self.donor = self._type_giver() or self.input

    def _type_giver(self) -> fx.Node | None:
        """A norm's weight, whole on every rank: constants take their type and device from it."""
        seen, stack = {self.boundary.input}, [self.boundary.output]
        while stack:
            node = stack.pop()
            if node in seen or self.trace.is_constant(node):
                continue
            seen.add(node)
            stack += node.all_input_nodes
            if node not in self.trace.parameters or len(shape_of(node)) != 1:
                continue
            if all(opname(u) in ("layer_norm", "rms_norm", "mul") for u in node.users):
                return self.weight(self.trace.parameters[node], WHOLE)
        return None

    # ---------------------------------------------------------------------------- values

    def value(self, node: fx.Node) -> View:
        if node not in self.values:
            self.values[node] = self._raised(node)
        return self.values[node]

    def _raised(self, node: fx.Node) -> View:
        if node in self.trace.parameters:
            return whole(self.weight(self.trace.parameters[node], WHOLE))
        if self.trace.is_constant(node):
            return whole(self.constant(node))
        found: View | None = None
        for rule in self.table.get(opname(node), ()):
            found = rule(self, node)
            if found is not None:
                break
        if found is None:
            found = self.table["getitem"][0](self, node) if _is_getitem(node) else None
        if found is None:
            found = whole(self.taken_over(node))
        if node.meta.get("no_grad"):
            found = whole(self.aten("detach.default", [self.exact(found)], node))
        return found

    # ---------------------------------------------------------------------------- constants

    def taken_over(self, node: fx.Node) -> fx.Node:
        """A traced node as it stands, on operands in exactly the shapes that it saw."""
        index = None
        if _is_getitem(node):
            node, index = node.args[0], int(node.args[1])  # type: ignore[assignment, arg-type]
        args = fx.map_arg(node.args, lambda n: self.exact(self.value(n)))
        options = fx.map_arg(node.kwargs, lambda n: self.exact(self.value(n)))
        options = {k: v for k, v in options.items() if k != "pin_memory"}
        return self.aten(aten_name(node), args, node, options, index)

    def constant(self, node: fx.Node, then: Callable[[Tensor], Tensor] | None = None) -> fx.Node:
        """A constant, or what `then` makes of it, computed again in the emitted program."""
        return self.once(("constant", node, then), lambda: self._constant(node, then))

    def _constant(self, node: fx.Node, then: Callable[[Tensor], Tensor] | None) -> fx.Node:
        known: dict[fx.Node, Any] = {}
        for place in functional.recomputed(self.trace, node, then).nodes:
            inner = place
            if inner.op == "output":
                result = known[inner.args[0]]
                break
            index = None
            if inner.target is functional.getitem:
                inner, index = inner.args
            elif isinstance(inner.meta["val"], list | tuple):
                continue
            known[place] = self._recomputed(inner, known, index)
        if self.builder._meta[result].is_floating_point() and self.is_floating(self.donor):
            result = self._again("type_as.default", [result, self.donor], {})
        return result

    def _recomputed(self, inner: fx.Node, known: dict[fx.Node, Any], index: int | None) -> fx.Node:
        args: Any = fx.map_arg(inner.args, known.__getitem__)
        if opname(inner) in ("detach", "alias", "lift_fresh"):
            return args[0]
        if opname(inner) == "copy" and args[0].meta["shape"] == args[1].meta["shape"]:
            return self._as_floating(args[1]) if self.is_floating(args[0]) else args[1]
        if functional.turns_floating(inner):
            args = fx.map_arg(args, self._as_floating)
        options = {k: v for k, v in inner.kwargs.items() if k not in ("pin_memory", "layout")}
        if not inner.all_input_nodes:
            options |= functional.factory_options(inner)
        return self._again(aten_name(inner), args, options, index)

    def _as_floating(self, node: fx.Node) -> fx.Node:
        if self.is_floating(node):
            return node
        return self._again("_to_copy.default", [node], {"dtype": torch.float32})

    def _again(
        self, target: str, args: Sequence[Any], options: dict[str, Any], index: int | None = None
    ) -> fx.Node:
        return self.aten(target, args, None, options, index, donor=self.donor)

    # ---------------------------------------------------------------------------- dropout

    def dropped(self, view: View, p: float, at: fx.Node) -> View:
        if view.node.meta["shape"][0] != self.boundary.sequences:
            view = whole(self.exact(view))
        self.dropout = True
        if self._samples is None:
            self._samples = self.another_input("samples", (self.boundary.sequences,), "B")
        number, self._count = self._count, self._count + 1
        node = self.emit(dropout, view.node, self._samples, p, number, label="dropped", at=at)
        return replace(view, node=node)

    # ---------------------------------------------------------------------------- the end

    def another_input(self, name: str, sizes: tuple[int, ...], dims: str) -> fx.Node:
        graph = self.builder.unit.graph
        first = next((n for n in graph.nodes if n.op != "placeholder"), None)
        with graph.inserting_before(first):
            return self.builder.input(name, sizes, dims)

    def replicated(self) -> list[tuple[str, str]]:
        """(where, what) of the values that were taken over as they stand."""
        found = []
        for node in self.builder.unit.graph.nodes:
            if node.target is opaque and node not in self.fixed:
                what = node.args[-1].target.partition(".")[0]
                found.append((".".join(node.meta["scope"]), what))
        return found

    def finish(self, result: fx.Node) -> Unit:
        unit = self.builder.finish(result)
        for node in reversed(list(unit.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                unit.graph.erase_node(node)
        name_heads(unit.graph)
        unit.graph, copies = tidied(unit.graph)
        for node in unit.graph.nodes:
            if node.op == "get_attr":
                letters = parameter_letters(node)
                stored = replace(node.meta["parameter"], dims=letters)
                unit.parameters[stored.path] = node.meta["parameter"] = stored
                node.meta["dims"] = letters
        self.names = {copies[n]: known for n, known in self.names.items() if n in copies}
        self.fixed = {copies[n] for n in self.fixed if n in copies}
        for node in self.fixed:
            node.meta["constant"] = True
        return unit

    def contested(self) -> frozenset[str]:
        """Parameters stored in two forms, or in parts that are not the whole."""
        uses: dict[str, set[Form]] = {}
        for name, form in self.names.values():
            uses.setdefault(name, set()).add(form)
        bad = set()
        for name, forms in uses.items():
            kinds = {f[0] for f in forms}
            rows = sum(int(f[2]) - int(f[1]) for f in forms if f[0] == "rows")
            partial = kinds == {"rows"} and rows == self.trace.module.get_parameter(name).shape[0]
            if (len(forms) > 1 and not partial) or (kinds == {"rows"} and not partial):
                bad.add(name)
        return frozenset(bad)


Rule = Callable[[UnitRaiser, fx.Node], View | None]
Table = dict[str, tuple[Rule, ...]]


def _is_getitem(node: fx.Node) -> bool:
    return node.target is functional.getitem


def aten_name(node: fx.Node) -> str:
    """`add.Tensor` of aten.add.Tensor.

    Errors: Unsupported for an operator that PyTorch itself does not bring.
    """
    target = node.target
    if not opname(node):
        raise Unsupported(
            f"the operator `{target}` in `{module_path(node)}`, which is not PyTorch's"
        )
    return f"{target._overloadpacket.__name__}.{target._overloadname}"  # type: ignore[union-attr]
