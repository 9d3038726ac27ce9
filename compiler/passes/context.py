"""Split tokens over context ranks: the graph of one of them.

before: a graph on whole sequences
after:  a graph on one rank's tokens, in which whatever needs other ranks' tokens is an operator
        that fetches them

The context axis has the states of `placement.py`: a value is split along its tokens, or the same
on all ranks with a gradient that is a sum over them (`shadow`), as every parameter is. An operator
runs on a slice where its rule lets it. Where it must know its tokens' places, or others' tokens, it
is replaced by its context form. Any other gathers its tokens, runs whole, and keeps this rank's
part of the result: dearer, and right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from torch import fx

from llmspec.compiler.errors import InternalError
from llmspec.compiler.graph import ModelGraph, Unit
from llmspec.compiler.ops import elementwise
from llmspec.compiler.ops.attention import attention
from llmspec.compiler.ops.context import gather_tokens, own_tokens
from llmspec.compiler.ops.context_attention import STYLES, divides_heads
from llmspec.compiler.ops.registry import (
    CONTEXT_FORMS,
    choices,
    entry_of,
    numel,
    shape_of,
    tensor_operands,
)
from llmspec.compiler.placement import (
    PARTIAL,
    SHADOW,
    WHOLE,
    Kind,
    Split,
    State,
    local_shape,
)

ALL = "W"
"""The letter of tokens that a context rank has gathered from all of them."""


def chunks(ranks: int) -> int:
    """Into how many parts the order of tokens cuts a sequence."""
    return 2 * ranks


def possible_styles(graph: ModelGraph, ranks: int) -> tuple[str, ...]:
    """In which styles `ranks` can share the model's sequences; none when they cannot."""
    if graph.tokens % chunks(ranks):
        return ()
    calls = [n for unit in graph.units.values() for n in unit.calls()]
    spread = [n for n in calls if n.target is attention]
    if not spread:
        return ("gather",)
    return tuple(
        style
        for style in STYLES
        if style != "ulysses" or all(divides_heads(n, ranks) for n in spread)
    )


def split_context(graph: ModelGraph, ranks: int, style: str) -> ModelGraph:
    """Errors: InternalError for a style that is not possible."""
    if style not in possible_styles(graph, ranks):
        raise InternalError(f"{ranks} context ranks cannot share {graph.name} by {style}")
    units = {
        name: _Splitter(unit, graph.sequences, graph.tokens, ranks, style).run()
        for name, unit in graph.units.items()
    }
    return replace(graph, units=units, tokens=graph.tokens // ranks)


@dataclass
class _Splitter:
    unit: Unit
    sequences: int
    tokens: int
    ranks: int
    style: str
    graph: fx.Graph = field(default_factory=fx.Graph)
    new: dict[fx.Node, fx.Node] = field(default_factory=dict)
    states: dict[fx.Node, State] = field(default_factory=dict)
    converted: dict[tuple[fx.Node, State], fx.Node] = field(default_factory=dict)

    def run(self) -> Unit:
        for node in self.unit.graph.nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op != "output":
                self._copy(node)
        self.graph.output(self._result())
        return Unit(
            name=self.unit.name,
            graph=self.graph,
            inputs=self.unit.inputs,
            span=self.unit.span,
            parameters=self.unit.parameters,
        )

    def _copy(self, node: fx.Node) -> None:
        """An input or a parameter."""
        if node.op == "get_attr":
            state = SHADOW
        else:
            state = WHOLE if str(node.target) == "samples" else Split(1)
        self._keep(node, self.graph.node_copy(node, lambda n: self.new[n]), state)

    def _keep(self, node: fx.Node, made: fx.Node, state: State) -> None:
        made.meta = dict(node.meta)
        made.meta["shape"] = local_shape(shape_of(node), state, self.ranks)
        self.new[node], self.states[node] = made, state

    def _call(self, node: fx.Node) -> None:
        operands = tensor_operands(node)
        have = tuple(self.states[o] for o in operands)
        make = CONTEXT_FORMS.get(node.target)  # type: ignore[arg-type]
        form = make(node, have, self.ranks, self.style) if make else None
        if form is not None:
            function, more, wants, result = (
                form.function, form.arguments, form.operands, form.result,
            )  # fmt: skip
        else:
            wants, result = self._cheapest(node, have)
            function, more = node.target, ()  # type: ignore[assignment]
        values = iter([self._as(o, want, node) for o, want in zip(operands, wants, strict=True)])
        args = tuple(next(values) if isinstance(a, fx.Node) else a for a in node.args)
        made = self.graph.create_node("call_function", function, (*args, *more), name=node.name)
        self._keep(node, made, result)
        gathered = any(h.kind is Kind.SPLIT and w != h for h, w in zip(have, wants, strict=True))
        if result == SHADOW:
            made.meta["dims"] = self._dims(node, SHADOW)
        if result == SHADOW and gathered and shape_of(node)[:2] == (self.sequences, self.tokens):
            # every rank has computed all of it; from here on each goes its own way
            part = self._move(node, Split(1), own_tokens, 1, node.meta["scope"])
            self.new[node], self.states[node] = part, Split(1)

    def _cheapest(self, node: fx.Node, have: tuple[State, ...]) -> tuple[tuple[State, ...], State]:
        """(states of the operands, of the result) that gather least; all gathered where the rule
        splits nothing."""
        best: tuple[int, tuple[State, ...], State] | None = None
        for choice in choices(entry_of(node).rule(node), chunks(self.ranks)):
            if choice.name == "whole" or (choice.result == PARTIAL and shape_of(node) != ()):
                continue
            cost = self._gathered_elements(node, have, choice.operands)
            if cost is not None and (best is None or cost < best[0]):
                best = cost, choice.operands, choice.result
        if best is None:
            raise InternalError(f"{self.unit.name}.{node.name} cannot run on context ranks")
        return best[1], best[2]

    def _gathered_elements(
        self, node: fx.Node, have: tuple[State, ...], want: tuple[State, ...]
    ) -> int | None:
        """What operands move to get there; None where that cannot be."""
        total = 0
        for operand, a, b in zip(tensor_operands(node), have, want, strict=True):
            shape = shape_of(operand)
            if a == b or (a in (SHADOW, WHOLE) and b in (SHADOW, WHOLE)):
                continue
            if a.kind is Kind.SPLIT and b in (SHADOW, WHOLE):
                total += math.prod(shape)
            elif a in (SHADOW, WHOLE) and b.dim is not None:
                if shape[b.dim] % chunks(self.ranks):
                    return None
            else:
                return None
        return total

    def _as(self, value: fx.Node, want: State, reader: fx.Node) -> fx.Node:
        have = self.states[value]
        if have == want or (have.kind is not Kind.SPLIT and want.kind is not Kind.SPLIT):
            return self.new[value]
        key = (value, SHADOW if want == WHOLE else want)
        if key not in self.converted:
            scope = reader.meta.get("scope", ())
            if have.kind is Kind.SPLIT:
                assert have.dim is not None, "a split value is split along a dimension"
                made = self._move(value, SHADOW, gather_tokens, have.dim, scope)
            else:
                assert want.dim is not None, "a split value is split along a dimension"
                made = self._move(value, want, own_tokens, want.dim, scope)
            self.converted[key] = made
        return self.converted[key]

    def _move(self, value: fx.Node, want: State, function, dim: int, scope) -> fx.Node:  # type: ignore[no-untyped-def]
        made = self.graph.create_node(
            "call_function",
            function,
            (self.new[value], dim, self.ranks),
            name=f"{value.name}_{function.__name__}",
        )
        made.meta = {k: v for k, v in value.meta.items() if k != "parameter"}
        made.meta |= {
            "shape": local_shape(shape_of(value), want, self.ranks),
            "dims": self._dims(value, want),
            "scope": scope,
        }
        return made

    def _dims(self, node: fx.Node, state: State) -> str:
        """Letters of a value: its tokens are this rank's, unless it has those of all."""
        dims: str = node.meta["dims"]
        if state != SHADOW or numel(shape_of(node)) == 0:
            return dims
        sizes = zip(dims, shape_of(node), strict=False)
        return "".join(ALL if c in "TS" and n == self.tokens else c for c, n in sizes)

    def _result(self) -> fx.Node:
        """Tokens stay split between units; of a loss each rank has its part."""
        result = self.unit.result()
        state = self.states[result]
        if shape_of(result):
            return self._as(result, Split(1), self.unit.output())
        if state == PARTIAL:
            return self.new[result]
        # every rank has the whole loss, and their parts are added up
        made = self.graph.create_node(
            "call_function", elementwise.divide, (self.new[result], float(self.ranks))
        )
        made.meta = dict(self.new[result].meta)
        return made
