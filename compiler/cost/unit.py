"""What one placed unit costs on one tensor rank, for one micro-batch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from torch import fx

from llmspec.compiler.cost.compute import OperatorCost, is_integer, local_shapes, operator_cost
from llmspec.compiler.cost.hardware import WEIGHT, Machine
from llmspec.compiler.cost.late import NOTHING_LATE, Late, late_of
from llmspec.compiler.cost.moments import At, Moments, Waiting, worst_of
from llmspec.compiler.cost.network import Group, collective_s, exposed_s
from llmspec.compiler.cost.software import gathered, in_gate, product_shapes
from llmspec.compiler.graph import Unit
from llmspec.compiler.ops.collective import is_collective
from llmspec.compiler.ops.registry import (
    Choice,
    Sends,
    Shapes,
    choice_named,
    entry_of,
    late_weight,
    numel,
    shape_of,
    tensor_operands,
)
from llmspec.compiler.placement import (
    SHADOW,
    WHOLE,
    Collective,
    Conversion,
    Kind,
    State,
    conversion,
    local_shape,
    parse_state,
)
from llmspec.compiler.plan import UnitPlacement

K = TypeVar("K", bound=Hashable)

SMALLEST_SHARE = 16
"""Of a block's input: smaller values stay on the device (runtime/host_activations.py has the same):
starting a copy of less takes longer than the copy."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A placement with its names resolved: the choice of each call, the state of each parameter
    node."""

    choices: dict[fx.Node, Choice]
    parameters: dict[str, State]
    boundary_in: State
    boundary_out: State

    def have(self, node: fx.Node) -> State:
        """The state in which a value comes into being."""
        if node.op == "call_function":
            return self.choices[node].result
        if is_integer(node):
            return WHOLE
        return self.parameters[str(node.target)] if node.op == "get_attr" else self.boundary_in


def resolve(unit: Unit, placement: UnitPlacement, ranks: int) -> Layout:
    """Errors: KeyError when the placement names a choice that the unit does not have."""
    found: dict[fx.Node, Choice] = {}
    for node in unit.calls():
        choice = choice_named(placement.nodes[node.name], entry_of(node).rule(node), ranks)
        if choice is None:
            raise KeyError(placement.nodes[node.name])
        found[node] = choice
    return Layout(
        found,
        {path: parse_state(text) for path, text in placement.parameters.items()},
        parse_state(placement.boundary_in),
        parse_state(placement.boundary_out),
    )


def same_memory(node: fx.Node) -> bool:
    """Whether a call gives its first operand back, perhaps in another shape."""
    return entry_of(node).alias or entry_of(node).passes


def storage(layout: Layout, node: fx.Node, state: State) -> tuple[fx.Node, State]:
    """The value and state whose bytes hold this one: an alias is its operand; a whole value read by
    split operators is the same tensor."""
    state = WHOLE if state == SHADOW else state
    while node.op == "call_function" and same_memory(node):
        choice = layout.choices[node]
        if state not in (choice.result, WHOLE) or (
            state == WHOLE and choice.result.kind is Kind.SPLIT
        ):
            break
        node, state = tensor_operands(node)[0], choice.operands[0]
        state = WHOLE if state == SHADOW else state
    return node, state


@dataclass(frozen=True, slots=True)
class Move:
    """One conversion of one value: seconds, what each direction sends, and bytes of the whole
    value."""

    forward_s: float
    backward_s: float
    forward: Collective = Collective.NONE
    backward: Collective = Collective.NONE
    size_bytes: int = 0


NO_MOVE = Move(0.0, 0.0)


def move(
    node: fx.Node, have: State, want: State, where: Group, machine: Machine, width: int
) -> Move | None:
    """What it costs to have `node` in another state; None when that cannot be."""
    step = conversion(have, want)
    if step is None:
        return None
    if have == want or is_integer(node):
        return NO_MOVE
    shape = shape_of(node)
    uneven = (s.dim is not None and shape[s.dim] % where.ranks for s in (have, want))
    if any(uneven):
        return None
    return priced_move(step, width * numel(shape), where, machine)


def ordered_bytes(kind: Collective, have: State, want: State, size: int, ranks: int) -> int:
    """What a collective that brings a value of `size` bytes from one state into another has beside
    both: the parts in the order of ranks, where they do not lie so (runtime/collectives.py)."""
    match kind:
        case Collective.ALL_GATHER | Collective.REDUCE_SCATTER:
            return size if (have.dim or want.dim) else 0
        case Collective.ALL_TO_ALL:
            return (bool(have.dim) + bool(want.dim)) * size // ranks
        case _:
            return 0


def priced_move(step: Conversion, size: int, where: Group, machine: Machine) -> Move:
    seconds = []
    for kind in (step.forward, step.backward):
        copied = size / machine.memory_bytes_per_s / where.ranks
        local = copied + machine.launch_s
        match kind:
            case Collective.NONE:
                seconds.append(0.0)
            case Collective.SLICE:
                seconds.append(local)
            case _:
                seconds.append(collective_s(kind, size, where) + local)
    return Move(seconds[0], seconds[1], step.forward, step.backward, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitCost:
    """One unit on one tensor rank and one micro-batch. Seconds and bytes; elements are numbers.

    tensor_*_s, context_*_s, expert_*_s: what it sends over these axes, less what computing hides.
    flops, backward_flops: executed.
    saved_bytes: kept by autograd from forward to backward. fixed_saved_bytes: of these, what does
        not grow with the micro-batch. away_bytes: storages large enough to go to host memory in
        the meantime. *_host_bytes: what that takes there.
    input_bytes, output_bytes: of the value that flows, as it crosses the unit's boundary.
    working_bytes: of what the unit's worst operator needs besides to run backward. moments: of its
        backward, what operators free of what they kept subtracted.
    making: the moment of a forward that makes gradients, where it does.
    elements: of its own parameters, here. shadow_elements: those whose gradient is a sum over
        ranks. cast_elements: of parameters that autograd keeps in the compute type when each use
        casts. expert_*: of these, what the expert ranks have split.
    largest_elements: of its largest parameter. tied_elements: of those that another unit owns.
    """

    forward_s: float = 0.0
    backward_s: float = 0.0
    tensor_forward_s: float = 0.0
    tensor_backward_s: float = 0.0
    context_forward_s: float = 0.0
    context_backward_s: float = 0.0
    expert_forward_s: float = 0.0
    expert_backward_s: float = 0.0
    flops: float = 0.0
    backward_flops: float = 0.0
    model_flops: float = 0.0
    saved_bytes: int = 0
    fixed_saved_bytes: int = 0
    away_bytes: int = 0
    away_host_bytes: int = 0
    input_host_bytes: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    working_bytes: int = 0
    moments: Moments = ()
    making: At | None = None
    elements: int = 0
    shadow_elements: int = 0
    cast_elements: int = 0
    expert_elements: int = 0
    expert_shadow_elements: int = 0
    expert_cast_elements: int = 0
    largest_elements: int = 0
    tied_elements: int = 0
    product_shapes: frozenset[tuple[int, int]] = frozenset()
    """Of weights that products multiply with (cost/software.py)."""
    late: Late = NOTHING_LATE
    """What a split backward leaves for later."""
    sends: tuple[tuple[str, str, int, int, int], ...] = ()
    """(axis, kind, bytes of the whole value, how often forward, how often backward)."""

    @property
    def whole_forward_s(self) -> float:
        """Computing and sending."""
        sent = self.tensor_forward_s + self.context_forward_s + self.expert_forward_s
        return self.forward_s + sent

    @property
    def whole_backward_s(self) -> float:
        sent = self.tensor_backward_s + self.context_backward_s + self.expert_backward_s
        return self.backward_s + sent

    @property
    def late_elements(self) -> int:
        """Whose gradients the second part of a split backward makes."""
        return max(0, self.elements - self.late.early_elements)


@dataclass
class _Tally:
    unit: Unit
    layout: Layout
    where: Group
    machine: Machine
    width: int
    kept: set[tuple[fx.Node, State]] = field(default_factory=set)
    cast: set[str] = field(default_factory=set)
    gathered: set[tuple[fx.Node, State]] = field(default_factory=set)
    """Kept as they were before a gather, which the backward repeats."""
    extras: list[int] = field(default_factory=list)
    frees: dict[fx.Node, tuple[int, int]] = field(default_factory=dict)
    """Bytes kept that an operator's backward is the last to need, and of these what the second part
    of a split one still needs."""
    inner: Mapping[str, Group] = field(default_factory=dict)
    sends: Counter[tuple[str, str, int, bool]] = field(default_factory=Counter)
    sent_s: defaultdict[tuple[str, bool], float] = field(default_factory=lambda: defaultdict(float))
    """Exposed seconds by (axis, forward)."""

    def keep(self, node: fx.Node, state: State) -> None:
        if is_integer(node):
            return
        if node.op == "get_attr":
            self.cast.add(str(node.target))
        elif in_gate(node, self.machine):
            self.keep(tensor_operands(node)[0], self.layout.choices[node].operands[0])
        else:
            root = storage(self.layout, node, state)
            if self.machine.regathers and gathered(self.layout.have(root[0]), root[1]):
                root = storage(self.layout, root[0], self.layout.have(root[0]))
                self.gathered.add((node, state))
            if root[0].op == "get_attr":
                self.cast.add(str(root[0].target))
            elif not is_integer(root[0]):
                self.kept.add(root)

    def operator(self, node: fx.Node) -> OperatorCost:
        choice = self.layout.choices[node]
        shapes = local_shapes(node, choice, self.where.ranks)
        cost = operator_cost(node, shapes, self.machine, self.width)
        if in_gate(node, self.machine):
            cost = replace(cost, forward_s=0.0, backward_s=0.0, working_bytes=0)
        operands = tensor_operands(node)
        before = set(self.kept)
        for i in cost.saved.operands:
            self.keep(operands[i], choice.operands[i])
        if cost.saved.result:
            self.keep(node, choice.result)
        self.extras.append(cost.saved.extra_bytes)
        new = self.kept - before
        own = sum(self.bytes_of(*key) for key in new)
        late = sum(self.bytes_of(*key) for key in new & self.late_operands)
        self.frees[node] = own + cost.saved.extra_bytes, late
        self.send(node, shapes, cost)
        numbers = entry_of(node).numbers
        for one in numbers(node, shapes, self.width) if numbers is not None else ():
            self.sends[one.axis, str(one.kind), one.size_bytes, True] += one.count
        return cost

    def send(self, node: fx.Node, shapes: Shapes, cost: OperatorCost) -> None:
        """Over the axes that the operator knows itself."""
        for one in sent_by(node, shapes):
            spent = operator_sends_s(one, cost, self.inner, self.machine, self.width)
            elements = (one.elements_forward, one.elements_backward)
            for count, seconds, forward in zip(elements, spent, (True, False), strict=True):
                if count and self.inner[one.axis].ranks > 1:
                    size = sent_width(one, self.width) * count
                    self.sends[one.axis, str(one.kind), size, forward] += one.count
                    self.sent_s[one.axis, forward] += seconds

    def moves(self) -> list[Move]:
        """Each wanted state of each value once, however many read it."""
        wanted: dict[tuple[fx.Node, State], None] = {}
        for node in self.unit.calls():
            for operand, state in zip(
                tensor_operands(node), self.layout.choices[node].operands, strict=True
            ):
                wanted[operand, state] = None
        wanted[self.unit.result(), self.layout.boundary_out] = None
        found = []
        for value, want in wanted:
            have = self.layout.have(value)
            made = move(value, have, want, self.where, self.machine, self.width)
            if made is not None and (value, want) in self.gathered:
                made = replace(made, backward_s=made.backward_s + made.forward_s)
                self.sends["tensor", str(made.forward), made.size_bytes, False] += 1
            if made is None or (value.op == "get_attr" and have != want):
                raise ValueError(f"{self.unit.name}.{value.name} cannot go from {have} to {want}")
            self.sends["tensor", str(made.forward), made.size_bytes, True] += 1
            self.sends["tensor", str(made.backward), made.size_bytes, False] += 1
            found.append(made)
        return found

    @cached_property
    def late_operands(self) -> set[tuple[fx.Node, State]]:
        """What products multiply with, whose weights' gradients may come later."""
        products = [n for n in self.unit.calls() if late_weight(n) is not None]
        pairs = ((tensor_operands(n)[0], self.layout.choices[n].operands[0]) for n in products)
        return {storage(self.layout, *pair) for pair in pairs}

    def late(self, costs: list[OperatorCost], elements: Mapping[str, int]) -> Late:
        def state(node: fx.Node, i: int | None) -> tuple[fx.Node, State]:
            choice = self.layout.choices[node]
            if i is None:
                return node, choice.result
            return tensor_operands(node)[i], choice.operands[i]

        return late_of(
            self.unit,
            {n: c.backward_s for n, c in zip(self.unit.calls(), costs, strict=True)},
            elements,
            storage=lambda node, i: storage(self.layout, *state(node, i)),
            bytes_of=lambda node, i: self.bytes_of(*state(node, i)),
        )

    def moments(self, costs: list[OperatorCost], elements: Mapping[str, int]) -> Moments:
        """As the backward goes: each operator's gradients of weights come, what it needed goes."""
        calls = self.unit.calls()
        casts = new_casts({n: kept_weights(n, c) for n, c in zip(calls, costs, strict=True)})
        freed = later = cast = came = kept = 0
        found: list[At] = []
        waiting = Waiting()
        result = self.unit.result()
        waiting.come(result, self.bytes_of(result, self.layout.boundary_out))
        seen: set[str] = set()
        for node, cost in reversed(list(zip(calls, costs, strict=True))):
            late = kept + waiting.late_bytes()
            beside = waiting.through(
                node,
                self.gradients(node),
                hands_on=hands_on(node),
                late=late_weight(node) is not None,
            )
            if not entry_of(node).makes_gradients:  # whose work its forward has done
                found.append(At(came, -cast, 0, beside + cost.working_bytes - freed, late))
            own = sum(elements[w] for w in (weights_read(node) & elements.keys()) - seen)
            seen |= weights_read(node)
            came, cast = came + own, cast + sum(elements[w] for w in casts[node] & elements.keys())
            own_bytes, own_late = self.frees[node]
            kept += own_late
            freed, later = freed + later, own_bytes
            if entry_of(node).overwrites not in self.machine.fused:
                freed, later = freed + later, 0  # else the gradient is there
            if own:
                late = kept + waiting.late_bytes()
                found.append(At(came, -cast, own, waiting.total - freed, late))
        return worst_of(found)

    def making(self, costs: list[OperatorCost], elements: Mapping[str, int]) -> At | None:
        """Of an operator that makes gradients as it goes forward: it keeps no weights."""
        for node, cost in zip(self.unit.calls(), costs, strict=True):
            if entry_of(node).makes_gradients:
                cast = sum(elements[w] for w in weights_read(node) - self.cast)
                return At(0, cast, 0, cost.working_bytes)
        return None

    def gradients(self, node: fx.Node) -> dict[Hashable, int]:
        """Bytes of those of its operands."""
        states = zip(tensor_operands(node), self.layout.choices[node].operands, strict=True)
        return {
            operand: self.bytes_of(operand, state)
            for operand, state in states
            if operand.op != "get_attr" and not is_integer(operand)
        }

    def bytes_of(self, node: fx.Node, state: State) -> int:
        return self.width * numel(local_shape(shape_of(node), state, self.where.ranks))


def hands_on(node: fx.Node) -> bool:
    return entry_of(node).hands_on or same_memory(node)


def weight_under(node: fx.Node) -> fx.Node | None:
    """The weight that a value is, perhaps in another shape."""
    while node.op == "call_function" and not is_collective(node) and same_memory(node):
        node = tensor_operands(node)[0]
    return node if node.op == "get_attr" and not is_integer(node) else None


def kept_weights(node: fx.Node, cost: OperatorCost) -> set[str]:
    """That it keeps for its backward, by name."""
    operands = tensor_operands(node)
    found = [weight_under(operands[i]) for i in cost.saved.operands]
    return {str(w.target) for w in found if w is not None}


def new_casts(kept: Mapping[K, AbstractSet[str]]) -> dict[K, AbstractSet[str]]:
    """Of each operator, in their order, the weights that none before it has kept."""
    seen: set[str] = set()
    out: dict[K, AbstractSet[str]] = {}
    for operator, own in kept.items():
        out[operator] = own - seen
        seen |= own
    return out


def weights_read(node: fx.Node) -> set[str]:
    return {str(n.target) for n in node.all_input_nodes if n.op == "get_attr"}


def sent_by(node: fx.Node, shapes: Shapes) -> tuple[Sends, ...]:
    sends = entry_of(node).sends
    return sends(node, shapes) if sends is not None else ()


def sent_width(one: Sends, width: int) -> int:
    return max(width, 4) if one.wide else width


def operator_sends_s(
    one: Sends, cost: OperatorCost, inner: Mapping[str, Group], machine: Machine, width: int
) -> tuple[float, float]:
    """Exposed seconds (forward, backward) of what an operator sends by itself."""
    where, found = inner[one.axis], []
    for elements, computing_s in (
        (one.elements_forward, cost.forward_s),
        (one.elements_backward, cost.backward_s),
    ):
        sent = one.count * collective_s(one.kind, sent_width(one, width) * elements, where)
        found.append(exposed_s(sent, computing_s, machine.overlap) if one.hidden else sent)
    return found[0], found[1]


def host_bytes(size: int, machine: Machine) -> int:
    """What PyTorch takes for so many: pinned memory comes in powers of two."""
    return 1 << (size - 1).bit_length() if machine.pinned and size else size


def parameter_nodes(unit: Unit) -> list[fx.Node]:
    """The weights: buffers left out."""
    return [n for n in unit.graph.nodes if n.op == "get_attr" and not is_integer(n)]


def unit_cost(
    unit: Unit,
    layout: Layout,
    where: Group,
    machine: Machine,
    width: int,
    inner: Mapping[str, Group] | None = None,
) -> UnitCost:
    """`where`: the tensor ranks. `inner`: the groups of the axes that operators send over.

    Errors: ValueError when two placements disagree in a way that no conversion mends."""
    tally = _Tally(unit, layout, where, machine, width, inner=inner or {})
    costs = [tally.operator(node) for node in unit.calls()]
    moves = tally.moves()
    flow = next(n for n in unit.graph.nodes if n.op == "placeholder")
    into = (
        8 * numel(shape_of(flow)) if is_integer(flow) else tally.bytes_of(flow, layout.boundary_in)
    )
    elements: dict[str, int] = {}
    for node in parameter_nodes(unit):
        state = layout.parameters[str(node.target)]
        elements[str(node.target)] = numel(local_shape(shape_of(node), state, where.ranks))
    own = {p: e for p, e in elements.items() if unit.parameters[p].tied is None}
    shadow = {p: e for p, e in own.items() if layout.parameters[p] == SHADOW}
    cast = {p: elements[p] for p in tally.cast}
    kept = [*tally.extras, *(tally.bytes_of(*key) for key in tally.kept)]
    away = [size for size in kept if size and size >= into // SMALLEST_SHARE]
    shared = len(elements) if where.ranks > 1 else 0
    around = [shared * machine.besides_s(WEIGHT, 0.0, forward=f) for f in (True, False)]
    shapes: frozenset[tuple[int, int]] = frozenset()
    if machine.spare_gradients:
        shapes = product_shapes(unit.calls(), layout.parameters, where.ranks)
    return UnitCost(
        forward_s=sum(c.forward_s for c in costs) + around[0],
        backward_s=sum(c.backward_s for c in costs) + around[1],
        tensor_forward_s=sum(m.forward_s for m in moves),
        tensor_backward_s=sum(m.backward_s for m in moves),
        context_forward_s=tally.sent_s["context", True],
        context_backward_s=tally.sent_s["context", False],
        expert_forward_s=tally.sent_s["expert", True],
        expert_backward_s=tally.sent_s["expert", False],
        flops=sum(c.flops for c in costs),
        backward_flops=sum(c.backward_flops for c in costs),
        model_flops=sum(c.model_flops for c in costs),
        saved_bytes=sum(kept),
        fixed_saved_bytes=width * sum(c.saved.weight_elements for c in costs),
        away_bytes=sum(away),
        away_host_bytes=sum(host_bytes(size, machine) for size in away),
        input_host_bytes=host_bytes(into, machine),
        input_bytes=into,
        output_bytes=tally.bytes_of(unit.result(), layout.boundary_out),
        working_bytes=max((c.working_bytes for c in costs), default=0),
        moments=tally.moments(costs, own),
        making=tally.making(costs, elements),
        elements=sum(own.values()),
        shadow_elements=sum(shadow.values()),
        cast_elements=sum(cast.values()),
        expert_elements=_of_experts(unit, own),
        expert_shadow_elements=_of_experts(unit, shadow),
        expert_cast_elements=_of_experts(unit, cast),
        largest_elements=max(elements.values(), default=0),
        tied_elements=sum(elements.values()) - sum(own.values()),
        product_shapes=shapes,
        late=tally.late(costs, elements),
        sends=_by_size(tally.sends),
    )


def _of_experts(unit: Unit, elements: Mapping[str, int]) -> int:
    return sum(e for p, e in elements.items() if unit.parameters[p].expert_ranks > 1)


def _by_size(
    sends: Counter[tuple[str, str, int, bool]],
) -> tuple[tuple[str, str, int, int, int], ...]:
    quiet = (Collective.NONE, Collective.SLICE)
    keys = sorted({key[:3] for key in sends if key[1] not in quiet})
    return tuple((*key, sends[*key, True], sends[*key, False]) for key in keys)
