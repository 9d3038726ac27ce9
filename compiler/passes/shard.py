"""Shard one unit over the tensor axis: whole shapes become local ones, disagreeing placements
collectives.

before: a graph on whole tensors, and a choice per operator, a state per parameter, states at the
    boundary
after:  a graph on one rank's tensors, in which every conversion of placement is a node of its own
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from llmspec.compiler.errors import InternalError
from llmspec.compiler.graph import Unit, without_gradient
from llmspec.compiler.ops import collective
from llmspec.compiler.ops.collective import Move
from llmspec.compiler.ops.registry import (
    Choice,
    Localised,
    choice_named,
    entry_of,
    shape_of,
    tensor_operands,
)
from llmspec.compiler.placement import (
    WHOLE,
    Kind,
    State,
    conversion,
    local_shape,
    parse_state,
)
from llmspec.compiler.plan import UnitPlacement

AXIS = "tensor"


def whole_placement(unit: Unit) -> UnitPlacement:
    """Nothing is split: what one tensor rank runs."""
    return UnitPlacement(
        nodes={n.name: "whole" for n in unit.calls()},
        parameters=dict.fromkeys(unit.weights(), "whole"),
    )


def choice_of(node: fx.Node, placement: UnitPlacement, ranks: int) -> Choice:
    """Errors: InternalError when the plan names a choice that is not legal for the node."""
    name = placement.nodes[node.name]
    choice = choice_named(name, entry_of(node).rule(node), ranks)
    if choice is None:
        raise InternalError(f"{node.name} has no placement `{name}` on {ranks} ranks")
    return choice


def local_dims(node: fx.Node, state: State) -> str:
    """Variable suffix: the letter of a split dimension in lower case."""
    dims: str = node.meta["dims"]
    if state.kind is not Kind.SPLIT or state.dim is None or len(dims) <= state.dim:
        return dims
    return dims[: state.dim] + dims[state.dim].lower() + dims[state.dim + 1 :]


@dataclass
class _Sharder:
    unit: Unit
    placement: UnitPlacement
    ranks: int
    graph: fx.Graph = field(default_factory=fx.Graph)
    chosen: dict[fx.Node, Choice] = field(default_factory=dict)
    new: dict[fx.Node, fx.Node] = field(default_factory=dict)
    states: dict[fx.Node, State] = field(default_factory=dict)
    wants: dict[tuple[fx.Node, State], list[tuple[str, ...]]] = field(default_factory=dict)
    converted: dict[tuple[fx.Node, State], fx.Node] = field(default_factory=dict)

    def choice(self, node: fx.Node) -> Choice:
        if node not in self.chosen:
            self.chosen[node] = choice_of(node, self.placement, self.ranks)
        return self.chosen[node]

    def state_of(self, node: fx.Node) -> State:
        """Where the value lives as it is produced."""
        if node.op != "call_function" and without_gradient(node):
            return WHOLE
        if node.op == "get_attr":
            return parse_state(self.placement.parameters[node.meta["parameter"].path])
        if node.op == "placeholder":
            return parse_state(self.placement.boundary_in)
        return self.choice(node).result

    def wanted(self, node: fx.Node) -> tuple[State, ...]:
        if node.op == "output":
            return (self._boundary_out(),)
        return self.choice(node).operands

    def _boundary_out(self) -> State:
        scalar = shape_of(self.unit.result()) == ()
        return WHOLE if scalar else parse_state(self.placement.boundary_out)

    def collect(self) -> None:
        for node in self.unit.graph.nodes:
            if node.op != "output":
                self.states[node] = self.state_of(node)
            operands = tensor_operands(node) if node.op != "output" else (self.unit.result(),)
            if node.op not in ("call_function", "output"):
                continue
            for operand, want in zip(operands, self.wanted(node), strict=True):
                self.wants.setdefault((operand, want), []).append(node.meta.get("scope", ()))

    def _scope(self, value: fx.Node, have: State, want: State) -> tuple[str, ...]:
        """A sum belongs to the operator that made its terms, anything else to those who read it."""
        if have.kind is Kind.PARTIAL:
            return value.meta["scope"]
        readers = self.wants[value, want]
        common = readers[0]
        for scope in readers[1:]:
            same = [a == b for a, b in zip(common, scope, strict=False)]
            common = common[: same.index(False) if False in same else len(same)]
        return common

    def converted_value(self, value: fx.Node, want: State) -> fx.Node:
        have = self.states[value]
        if have == want:
            return self.new[value]
        key = (value, want)
        if key not in self.converted:
            self.converted[key] = self._convert(value, have, want)
        return self.converted[key]

    def _convert(self, value: fx.Node, have: State, want: State) -> fx.Node:
        step = conversion(have, want)
        if step is None:
            raise InternalError(f"{value.name}: nothing turns {have} into {want}")
        args: tuple[fx.node.Argument, ...] = (
            self.new[value],
            *collective.arguments(step, have, want),
        )
        function = collective.FUNCTIONS[step.function]
        node = self.graph.create_node(
            "call_function", function, args, name=f"{value.name}_{step.function}"
        )
        whole = shape_of(value)
        node.meta = dict(value.meta)
        node.meta.pop("parameter", None)
        node.meta |= {
            "shape": local_shape(whole, want, self.ranks),
            "dims": local_dims(value, want),
            "scope": self._scope(value, have, want),
            "move": Move(
                axis=AXIS, conversion=step, have=have, want=want, whole_shape=whole,
                ranks=self.ranks,
            ),
        }  # fmt: skip
        return node

    def _copy(self, node: fx.Node) -> None:
        state = self.states[node]
        copied = self.graph.node_copy(node, lambda n: self.new[n])
        copied.meta = dict(node.meta)
        copied.meta |= {
            "shape": local_shape(shape_of(node), state, self.ranks),
            "dims": local_dims(node, state),
            "state": state,
        }
        self.new[node] = copied

    def _call(self, node: fx.Node) -> None:
        choice = self.choice(node)
        operands = tensor_operands(node)
        values = iter(
            [self.converted_value(o, w) for o, w in zip(operands, choice.operands, strict=True)]
        )
        args = tuple(next(values) if isinstance(a, fx.Node) else a for a in node.args)
        copied = self.graph.create_node("call_function", node.target, args, name=node.name)
        copied.meta = dict(node.meta)
        copied.meta |= {
            "shape": local_shape(shape_of(node), choice.result, self.ranks),
            "dims": local_dims(node, choice.result),
            "state": choice.result,
            "localised": Localised(
                factor=choice.factor,
                ranks=self.ranks,
                whole_operands=tuple(shape_of(o) for o in operands),
                whole_result=shape_of(node),
            ),
        }
        self.new[node] = copied
        if choice.result.kind is Kind.PARTIAL:
            # the sum follows at once, inside the operator that made the terms
            for want in [w for v, w in self.wants if v is node and w != choice.result]:
                self.converted_value(node, want)

    def run(self) -> Unit:
        self.collect()
        for node in self.unit.graph.nodes:
            if node.op == "call_function":
                self._call(node)
            elif node.op != "output":
                self._copy(node)
        result = self.unit.result()
        self.graph.output(self.converted_value(result, self._boundary_out()))
        return Unit(
            name=self.unit.name,
            graph=self.graph,
            inputs=self.unit.inputs,
            span=self.unit.span,
            parameters=self.unit.parameters,
        )


def shard_unit(unit: Unit, placement: UnitPlacement, ranks: int) -> Unit:
    """The unit's graph for one of `ranks` tensor ranks.

    Errors: InternalError when the placement is not one that the registry allows.
    """
    return _Sharder(unit, placement, ranks).run()
