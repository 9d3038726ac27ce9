"""The cheapest placement of one unit on the tensor axis: an exact minimum by integer programming.

Binary: which choice each operator takes, which state each parameter is stored in. Continuous
between 0 and 1: which conversions of each value happen (one serves every reader that wants the same
state), which values autograd keeps. The objective is additive: seconds of operators and conversions
forward and backward, and prices for parameter bytes and for bytes kept until the backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import fx

from llmspec.compiler.cost.compute import is_integer, local_shapes, operator_cost
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.network import Group, collective_s
from llmspec.compiler.cost.types import Types
from llmspec.compiler.cost.unit import (
    Layout,
    move,
    operator_sends_s,
    parameter_nodes,
    same_memory,
    sent_by,
    storage,
)
from llmspec.compiler.errors import InternalError
from llmspec.compiler.graph import Unit, has_rows
from llmspec.compiler.ops.registry import (
    Choice,
    choices,
    entry_of,
    numel,
    shape_of,
    tensor_operands,
)
from llmspec.compiler.placement import (
    SHADOW,
    WHOLE,
    Collective,
    Kind,
    Split,
    State,
    local_shape,
)
from llmspec.compiler.plan import UnitPlacement

MICROSECONDS = 1e6
TIE = 1e-4
"""Microseconds added per place in an operator's list of choices: equal plans come out the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What memory is worth, in seconds per byte: of stored parameters (weights, gradients and
    moments together), of values kept until the backward. `microbatches`: how many share a step's
    costs."""

    parameter: float
    saved: float = 0.0
    microbatches: int = 8


def time_prices(machine: Machine, types: Types, microbatches: int = 8) -> Prices:
    """A parameter byte costs what a step really does with it: the optimizer reads and writes it,
    the data axis reduces its gradient over the network."""
    share = types.reduced / types.bytes_per_parameter
    step = 2.0 / machine.memory_bytes_per_s + 2.0 * share / machine.network_bytes_per_s
    return Prices(parameter=step / microbatches, microbatches=microbatches)


def memory_prices(machine: Machine, types: Types, microbatches: int = 8) -> Prices:
    """A byte is worth moving once over the link."""
    link = 1.0 / machine.link_bytes_per_s
    return Prices(parameter=link, saved=link, microbatches=microbatches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One unit to be placed. `sequence`: the value that flows between units is split along its
    tokens.

    inner: the groups of the axes that operators themselves send over.
    fixed: parameters whose state another unit has already chosen (a tied table).
    """

    unit: Unit
    ranks: int
    sequence: bool
    where: Group
    machine: Machine
    types: Types
    prices: Prices
    inner: Mapping[str, Group] = field(default_factory=dict)
    fixed: dict[str, State] = field(default_factory=dict)

    @property
    def boundary(self) -> State:
        return Split(1) if self.sequence else WHOLE

    @property
    def boundary_in(self) -> State:
        flow = next(n for n in self.unit.graph.nodes if n.op == "placeholder")
        return WHOLE if is_integer(flow) else self.boundary

    @property
    def boundary_out(self) -> State:
        return self.boundary if shape_of(self.unit.result()) else WHOLE


def splits_tokens(node: fx.Node, state: State) -> bool:
    """Whether a value [sequences, tokens, …] is split along its tokens."""
    plain = not is_integer(node) and node.op != "get_attr" and not has_rows(node)
    return plain and state == Split(1)


def legal_choices(problem: Problem, node: fx.Node) -> tuple[Choice, ...]:
    """The choices of a node that this problem allows: parameters are stored whole or split, and
    without sequence sharding nothing is split along its tokens."""
    operands = tensor_operands(node)
    found = []
    for choice in choices(entry_of(node).rule(node), problem.ranks):
        states = [*zip(operands, choice.operands, strict=True), (node, choice.result)]
        if any(o.op == "get_attr" and s.kind is Kind.PARTIAL for o, s in states):
            continue
        if not problem.sequence and any(splits_tokens(o, s) for o, s in states):
            continue
        found.append(choice)
    return tuple(found)


# --------------------------------------------------------------------------------------------------
# The parts of the objective, in seconds; brute force in the tests adds up the same ones


def choice_s(problem: Problem, node: fx.Node, choice: Choice) -> float:
    """An operator's two passes, and what it keeps besides its operands and result."""
    shapes = local_shapes(node, choice, problem.ranks)
    cost = operator_cost(node, shapes, problem.machine, problem.types.compute)
    sent = sum(
        sum(operator_sends_s(s, cost, problem.inner, problem.machine, problem.types.compute))
        for s in sent_by(node, shapes)
    )
    kept = problem.prices.saved * cost.saved.extra_bytes
    return cost.forward_s + cost.backward_s + sent + kept


def kept_values(node: fx.Node, choice: Choice) -> list[tuple[fx.Node, State]]:
    """What autograd keeps of a node's operands and result, parameters and integers left out."""
    shapes_free = entry_of(node).saved
    saved = shapes_free(node, local_shapes(node, choice, 1))
    operands = tensor_operands(node)
    pairs = [(operands[i], choice.operands[i]) for i in saved.operands]
    if saved.result:
        pairs.append((node, choice.result))
    return [(v, s) for v, s in pairs if v.op != "get_attr" and not is_integer(v)]


def parameter_s(problem: Problem, node: fx.Node, state: State) -> float:
    elements = numel(local_shape(shape_of(node), state, problem.ranks))
    price = problem.prices.parameter * problem.types.bytes_per_parameter * elements
    if state == SHADOW:
        size = problem.types.reduced * elements
        price += _reduced_s(problem, size) / problem.prices.microbatches
    return price


def _reduced_s(problem: Problem, size: int) -> float:
    return collective_s(Collective.ALL_REDUCE, size, problem.where)


def move_s(problem: Problem, node: fx.Node, have: State, want: State) -> float | None:
    """Seconds of a conversion; None where there is none."""
    if have == want:
        return 0.0
    if node.op == "get_attr" or (not problem.sequence and splits_tokens(node, want)):
        return None
    made = move(node, have, want, problem.where, problem.machine, problem.types.compute)
    return None if made is None else made.forward_s + made.backward_s


def kept_s(problem: Problem, node: fx.Node, state: State) -> float:
    size = problem.types.compute * numel(local_shape(shape_of(node), state, problem.ranks))
    return problem.prices.saved * size


def canonical(
    legal: dict[fx.Node, tuple[Choice, ...]], node: fx.Node, state: State
) -> tuple[fx.Node, State]:
    """The storage of a value, through every alias that can make it in this state."""
    state = WHOLE if state == SHADOW else state
    while node.op == "call_function" and same_memory(node):
        made = (c for c in legal[node] if (WHOLE if c.result == SHADOW else c.result) == state)
        choice = next(made, None)
        if choice is None:
            break
        node, state = tensor_operands(node)[0], choice.operands[0]
        state = WHOLE if state == SHADOW else state
    return node, state


# --------------------------------------------------------------------------------------------------
# The integer program


@dataclass
class _Matrix:
    """Rows `lower <= a · x <= upper` over variables that are numbered as they appear."""

    costs: list[float] = field(default_factory=list)
    integral: list[bool] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float, float]] = field(default_factory=list)

    def variable(self, cost: float, *, integral: bool = False) -> int:
        self.costs.append(cost * MICROSECONDS)
        self.integral.append(integral)
        return len(self.costs) - 1

    def row(self, coefficients: dict[int, float], lower: float, upper: float) -> None:
        self.rows.append((coefficients, lower, upper))

    def solve(self) -> np.ndarray | None:
        data, row, column = [], [], []
        for i, (coefficients, _, _) in enumerate(self.rows):
            for j, value in coefficients.items():
                data.append(value)
                row.append(i)
                column.append(j)
        shape = (len(self.rows), len(self.costs))
        matrix = csr_array((data, (row, column)), shape=shape)
        lower = np.array([r[1] for r in self.rows])
        upper = np.array([r[2] for r in self.rows])
        result = milp(
            np.array(self.costs),
            integrality=np.array(self.integral, dtype=int),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, lower, upper),
            options={"mip_rel_gap": 0.0},
        )
        return result.x if result.status == 0 else None


class _Program:
    """Writes one problem's integer program and reads its answer."""

    def __init__(self, problem: Problem):
        self.problem, self.matrix = problem, _Matrix()
        unit = problem.unit
        self.legal = {n: legal_choices(problem, n) for n in unit.calls()}
        self.taken: dict[tuple[fx.Node, int], int] = {}
        self.stored: dict[tuple[fx.Node, State], int] = {}
        self.have: dict[fx.Node, dict[State, list[int] | None]] = {}
        self.moved: dict[tuple[fx.Node, State], list[int]] = {}
        self.kept: dict[tuple[fx.Node, State], int] = {}
        for node in unit.calls():
            self._operator(node)
        for node in parameter_nodes(unit):
            self._parameter(node)
        for node in unit.graph.nodes:
            if node.op == "placeholder" or (node.op == "get_attr" and is_integer(node)):
                state = WHOLE if is_integer(node) else problem.boundary_in
                self.have[node] = {state: None}
        for node in unit.calls():
            self._reads(node)
        self._want(unit.result(), problem.boundary_out, None)

    def _operator(self, node: fx.Node) -> None:
        states: dict[State, list[int] | None] = {}
        for i, choice in enumerate(self.legal[node]):
            cost = choice_s(self.problem, node, choice) + i * TIE / MICROSECONDS
            index = self.matrix.variable(cost, integral=True)
            self.taken[node, i] = index
            (states.setdefault(choice.result, []) or states[choice.result]).append(index)  # type: ignore[union-attr]
        self.have[node] = states
        self.matrix.row({self.taken[node, i]: 1.0 for i in range(len(self.legal[node]))}, 1, 1)

    def _parameter(self, node: fx.Node) -> None:
        """Stored in one of the states that some reader wants."""
        fixed = self.problem.fixed.get(str(node.target))
        states: dict[State, list[int] | None] = {}
        for reader in node.users:
            for choice in self.legal.get(reader, ()):
                operands = zip(tensor_operands(reader), choice.operands, strict=True)
                for operand, state in operands:
                    if operand is node and state not in states and fixed in (None, state):
                        cost = parameter_s(self.problem, node, state)
                        self.stored[node, state] = self.matrix.variable(cost, integral=True)
                        states[state] = [self.stored[node, state]]
        self.have[node] = states
        self.matrix.row({self.stored[node, s]: 1.0 for s in states}, 1, 1)

    def _reads(self, node: fx.Node) -> None:
        by_state: dict[tuple[fx.Node, State], dict[int, None]] = {}
        for i, choice in enumerate(self.legal[node]):
            for operand, state in zip(tensor_operands(node), choice.operands, strict=True):
                by_state.setdefault((operand, state), {})[self.taken[node, i]] = None
        for (operand, state), readers in by_state.items():
            self._want(operand, state, list(readers))
        if self.problem.prices.saved > 0:
            self._keeps(node)

    def _moves(self, value: fx.Node, want: State) -> list[int]:
        """One variable per way to have `value` as `want`; a way is open only from the state it
        has."""
        if (value, want) in self.moved:
            return self.moved[value, want]
        ways = []
        for have, makers in self.have[value].items():
            cost = move_s(self.problem, value, have, want)
            if cost is None:
                continue
            way = self.matrix.variable(cost)
            ways.append(way)
            if makers is not None:
                self.matrix.row({way: 1.0} | dict.fromkeys(makers, -1.0), -np.inf, 0)
        self.moved[value, want] = ways
        return ways

    def _want(self, value: fx.Node, want: State, readers: list[int] | None) -> None:
        """If any of `readers` is chosen (None: always), some way to `want` is taken."""
        ways = dict.fromkeys(self._moves(value, want), -1.0)
        if readers is None:
            self.matrix.row(ways, -np.inf, -1)
        else:
            self.matrix.row(ways | dict.fromkeys(readers, 1.0), -np.inf, 0)

    def _keeps(self, node: fx.Node) -> None:
        by_storage: dict[tuple[fx.Node, State], dict[int, None]] = {}
        for i, choice in enumerate(self.legal[node]):
            for value, state in kept_values(node, choice):
                root = canonical(self.legal, value, state)
                if root[0].op != "get_attr" and not is_integer(root[0]):
                    by_storage.setdefault(root, {})[self.taken[node, i]] = None
        for root, keepers in by_storage.items():
            if root not in self.kept:
                self.kept[root] = self.matrix.variable(kept_s(self.problem, *root))
            self.matrix.row({self.kept[root]: -1.0} | dict.fromkeys(keepers, 1.0), -np.inf, 0)

    def layout(self, answer: np.ndarray) -> Layout:
        chosen = {
            node: next(c for i, c in enumerate(legal) if answer[self.taken[node, i]] > 0.5)
            for node, legal in self.legal.items()
        }
        stored = {str(n.target): s for (n, s), i in self.stored.items() if answer[i] > 0.5}
        return Layout(chosen, stored, self.problem.boundary_in, self.problem.boundary_out)


def objective_s(problem: Problem, layout: Layout) -> float:
    """The additive cost of a layout, in seconds; infinite when it needs a conversion that is not
    there."""
    total = sum(choice_s(problem, n, c) for n, c in layout.choices.items())
    wanted: set[tuple[fx.Node, State]] = {(problem.unit.result(), problem.boundary_out)}
    kept: set[tuple[fx.Node, State]] = set()
    for node, choice in layout.choices.items():
        wanted |= set(zip(tensor_operands(node), choice.operands, strict=True))
        kept |= {storage(layout, v, s) for v, s in kept_values(node, choice)}
    for value, want in wanted:
        cost = move_s(problem, value, layout.have(value), want)
        if cost is None:
            return float("inf")
        total += cost
    for node in parameter_nodes(problem.unit):
        total += parameter_s(problem, node, layout.parameters[str(node.target)])
    held = (k for k in kept if k[0].op != "get_attr" and not is_integer(k[0]))
    return total + sum(kept_s(problem, *root) for root in held)


def place(problem: Problem) -> Layout | None:
    """The cheapest layout; None when none is legal (a fixed parameter, an indivisible sequence).

    Errors: InternalError when the unit has a value that its operators cannot take in any state.
    """
    if problem.sequence:
        flow = next(n for n in problem.unit.graph.nodes if n.op == "placeholder")
        if shape_of(flow)[1] % problem.ranks:
            return None
    program = _Program(problem)
    for node, legal in program.legal.items():
        if not legal:
            raise InternalError(f"{problem.unit.name}.{node.name} has no legal placement")
    answer = program.matrix.solve()
    return None if answer is None else program.layout(answer)


def placement_of(layout: Layout) -> UnitPlacement:
    return UnitPlacement(
        boundary_in=str(layout.boundary_in),
        boundary_out=str(layout.boundary_out),
        nodes={node.name: choice.name for node, choice in layout.choices.items()},
        parameters={path: str(state) for path, state in layout.parameters.items()},
    )
