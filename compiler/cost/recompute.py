"""What it costs and saves to run operators of a unit again in its backward: sums over its lowered
graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import fx

from llmspec.compiler.cost.compute import is_integer, operator_cost
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.moments import At, Moments, Waiting, worst_of
from llmspec.compiler.cost.network import Group
from llmspec.compiler.cost.unit import (
    SMALLEST_SHARE,
    host_bytes,
    kept_weights,
    new_casts,
    operator_sends_s,
    ordered_bytes,
    parameter_nodes,
    priced_move,
    sent_by,
    weights_read,
)
from llmspec.compiler.graph import Unit
from llmspec.compiler.kernels.kernel import Kernel, pick
from llmspec.compiler.ops import collective
from llmspec.compiler.ops.registry import (
    entry_of,
    late_weight,
    numel,
    shape_of,
    shapes_of,
    tensor_operands,
)
from llmspec.compiler.placement import Collective, Kind
from llmspec.compiler.plan import EVERYTHING

Operators = tuple[str, ...] | str
"""Names of nodes of the lowered unit, in its order; or EVERYTHING."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """What one use of a unit runs again in its backward, and what it keeps until then.

    forward_s, tensor_s, context_s, expert_s, flops: of what runs again.
    kept_bytes: from forward to backward. keeps_casts: and the weights as its operators cast them.
    away_bytes, away_host_bytes: of what is kept, storages large enough to wait in host memory.
    working_bytes: the most bytes beyond those kept while the unit goes backward: values come back,
        those that were kept go. moments: of the backward, with what operators need to run, in
        bytes beside both.
    sends: (axis, kind, bytes of the whole value, how often).
    """

    operators: Operators = ()
    forward_s: float = 0.0
    tensor_s: float = 0.0
    context_s: float = 0.0
    expert_s: float = 0.0
    flops: float = 0.0
    kept_bytes: int = 0
    keeps_casts: bool = True
    away_bytes: int = 0
    away_host_bytes: int = 0
    working_bytes: int = 0
    moments: Moments = ()
    sends: tuple[tuple[str, str, int, int], ...] = ()

    @property
    def whole_s(self) -> float:
        """Computing and sending."""
        return self.forward_s + self.tensor_s + self.context_s + self.expert_s


@dataclass(eq=False, slots=True)
class Step:
    """One node of a lowered unit as recomputation sees it. Views are part of what they view.

    reads: values, parameters and integers apart. keeps: those of them, and its own result, that it
        keeps for its backward. extra_bytes: kept besides. size_bytes: of its result.
    working_bytes, making_bytes: of what its backward and its forward need besides. hands_on: as of
        its registry entry.
    weights: elements of those whose gradients it makes, by name. casts: those of them that autograd
        keeps for it as its use casts them. makes_gradients: as of its registry entry.
    sent_s: exposed seconds of what it sends, by axis.
    """

    name: str
    node: fx.Node
    size_bytes: int
    reads: tuple[str, ...] = ()
    keeps: frozenset[str] = frozenset()
    extra_bytes: int = 0
    working_bytes: int = 0
    making_bytes: int = 0
    hands_on: bool = False
    weights: Mapping[str, int] = field(default_factory=dict)
    casts: frozenset[str] = frozenset()
    makes_gradients: bool = False
    computing_s: float = 0.0
    flops: float = 0.0
    sent_s: Mapping[str, float] = field(default_factory=dict)
    sends: tuple[tuple[str, str, int, int], ...] = ()

    @property
    def whole_s(self) -> float:
        return self.computing_s + sum(self.sent_s.values())


@dataclass(frozen=True)
class Flow:
    """A lowered unit as steps in order.

    inputs: bytes of what flows into it, by name. result: the value that flows out: whoever reads
        it next keeps it, so it is never dropped.
    """

    steps: dict[str, Step]
    inputs: dict[str, int]
    result: str
    machine: Machine

    def size_bytes(self, value: str) -> int:
        return self.inputs[value] if value in self.inputs else self.steps[value].size_bytes

    def candidates(self) -> list[Step]:
        """Steps that may run again: what makes one value."""
        return [s for s in self.steps.values() if s.name != self.result and s.node.target != pick]

    def kept_values(self) -> set[str]:
        """What autograd keeps when nothing is dropped."""
        return {value for value, names in self.keepers.items() if names}

    @cached_property
    def keepers(self) -> dict[str, list[str]]:
        """The steps that keep each value for their backward."""
        found: dict[str, list[str]] = {value: [] for value in self.values()}
        for step in self.steps.values():
            for value in step.keeps:
                found[value].append(step.name)
        return found

    @cached_property
    def late_values(self) -> set[str]:
        """What products multiply with, whose weights' gradients may come later."""
        products = [s for s in self.steps.values() if late_weight(s.node) is not None]
        return {step.reads[0] for step in products if step.reads}

    def needed(self, chosen: Collection[str]) -> set[str]:
        """Of the chosen operators those that the backward asks for: for what they keep besides,
        for results that someone keeps or that another of them reads."""
        asked = self.kept_values()
        found: set[str] = set()
        for step in reversed(self.steps.values()):
            if step.name in chosen and (step.extra_bytes or step.name in asked):
                found.add(step.name)
                asked |= set(step.reads)
        return found

    def again(self, operators: Operators) -> Again:
        if isinstance(operators, str):
            return self._everything()
        runs = self.needed(operators)
        kept = self._kept(runs)
        made = self._traded(runs, kept)
        most, moments = self._backward(runs, kept)
        back = max(0, most - made.kept_bytes)
        going = tuple(at.less(made.kept_bytes + back) for at in moments)
        return replace(made, working_bytes=back, moments=going)

    def traded(self, operators: Operators) -> Again:
        """Seconds for bytes kept, without what there is besides while the unit goes backward."""
        if isinstance(operators, str):
            return self._everything()
        runs = self.needed(operators)
        return self._traded(runs, self._kept(runs))

    def _traded(self, runs: set[str], kept: set[str]) -> Again:
        sizes = [self.size_bytes(v) for v in kept]
        sizes += [s.extra_bytes for s in self.steps.values() if s.name not in runs]
        return self._priced(
            tuple(n for n in self.steps if n in runs),
            [s for s in self.steps.values() if s.name in runs],
            sizes,
        )

    def kept(self, operators: Operators) -> tuple[set[str], set[str]]:
        """(steps that run again, values that are kept for them and for the backward)."""
        if isinstance(operators, str):
            return set(self.steps), set(self.inputs)
        runs = self.needed(operators)
        return runs, self._kept(runs)

    def _kept(self, runs: set[str]) -> set[str]:
        kept = self.kept_values()
        for name in runs:
            kept |= set(self.steps[name].reads)
        return kept - runs

    def _everything(self) -> Again:
        """torch.utils.checkpoint: the forward runs until the last value that its backward keeps is
        there."""
        steps = list(self.steps.values())
        last = max((i for i, s in enumerate(steps) if s.keeps or s.extra_bytes), default=-1)
        after = bool(steps) and (steps[last].extra_bytes or steps[last].name in steps[last].keeps)
        if not self.machine.early_stop:
            last, after = len(steps) - 1, True
        made = self.kept_values() - set(self.inputs)
        whole = sum(map(self.size_bytes, made)) + sum(s.extra_bytes for s in steps)
        _, moments = self._backward(set(), made)
        moments = worst_of([At(0, 0, 0, self._forward_bytes(made)), *moments])
        return self._priced(
            EVERYTHING,
            steps[: last + 1] if after else steps[: max(last, 0)],
            list(self.inputs.values()),
            working_bytes=whole,
            moments=tuple(at.less(whole) for at in moments),
            keeps_casts=False,
        )

    def _priced(
        self,
        operators: Operators,
        steps: Iterable[Step],
        sizes: list[int],
        *,
        working_bytes: int = 0,
        moments: Moments = (),
        keeps_casts: bool = True,
    ) -> Again:
        steps = list(steps)
        smallest = sum(self.inputs.values()) // SMALLEST_SHARE
        away = [size for size in sizes if size and size >= smallest]
        sent = {a: sum(s.sent_s.get(a, 0.0) for s in steps) for a in AXES}
        counted: Counter[tuple[str, str, int]] = Counter()
        for step in steps:
            for axis, kind, size, often in step.sends:
                counted[axis, kind, size] += often
        return Again(
            operators=operators,
            forward_s=sum(s.computing_s for s in steps),
            tensor_s=sent["tensor"],
            context_s=sent["context"],
            expert_s=sent["expert"],
            flops=sum(s.flops for s in steps),
            kept_bytes=sum(sizes),
            away_bytes=sum(away),
            away_host_bytes=sum(host_bytes(size, self.machine) for size in away),
            keeps_casts=keeps_casts,
            working_bytes=working_bytes,
            moments=moments,
            sends=tuple((*key, often) for key, often in sorted(counted.items())),
        )

    def _forward_bytes(self, kept: set[str]) -> int:
        """The most bytes at once as all of it runs again, before its backward: of what is kept,
        what an operator reads and makes, and the gradient that waits."""
        worst = now = 0
        for step in self.steps.values():
            passing = {*step.reads, step.name} - kept - self.inputs.keys()
            now += step.extra_bytes + (step.size_bytes if step.name in kept else 0)
            reads = sum(map(self.size_bytes, passing))
            worst = max(worst, now + reads + step.making_bytes)
        return worst + self.size_bytes(self.result)

    def _backward(self, runs: set[str], kept: set[str]) -> tuple[int, Moments]:
        """The most bytes of kept and recomputed values at once, step by step backward, as
        `runtime/recompute.py` makes and drops them; and the moments with what operators need."""
        readers = {value: set(names) for value, names in self.keepers.items()}
        for name in runs:  # what runs again holds what it reads until it has run
            for value in self.steps[name].reads:
                readers[value].add(f"again {name}")
        alive = {v for v in kept if readers[v]}
        extras = {s.name for s in self.steps.values() if s.extra_bytes and s.name not in runs}
        ran: set[str] = set()
        now = sum(map(self.size_bytes, alive)) + sum(self.steps[n].extra_bytes for n in extras)
        worst = came = cast = late = 0
        later = self.late_values
        moments: list[At] = []
        waiting = Waiting()
        waiting.come(self.result, self.size_bytes(self.result))
        seen: set[str] = set()
        casts = new_casts({s.name: s.casts for s in self.steps.values()})

        def release(reader: str, values: Iterable[str]) -> None:
            nonlocal now, late
            for value in values:
                readers[value].discard(reader)
                if not readers[value] and value in alive:
                    alive.remove(value)
                    now -= self.size_bytes(value)
                    late += self.size_bytes(value) if value in later else 0

        def run(name: str) -> None:
            nonlocal now, worst
            ran.add(name)
            step = self.steps[name]
            for value in step.reads:
                if value in runs and value not in ran:
                    run(value)
            if readers[name] and name not in alive:
                alive.add(name)
                now += step.size_bytes
            if step.extra_bytes and name in ahead and name not in extras:
                extras.add(name)
                now += step.extra_bytes
            worst = max(worst, now)
            here = now + waiting.total + step.making_bytes
            moments.append(At(came, -cast, 0, here, late + waiting.late_bytes()))
            release(f"again {name}", step.reads)

        ahead = set(self.steps)
        for step in reversed(self.steps.values()):
            wanted = [v for v in step.keeps if v in runs]
            wanted += [step.name] if step.extra_bytes and step.name in runs else []
            for name in wanted:
                if name not in ran:
                    run(name)
            worst = max(worst, now)
            gradients: dict[Hashable, int] = {v: self.size_bytes(v) for v in step.reads}
            left = late + waiting.late_bytes()
            product = late_weight(step.node) is not None
            beside = waiting.through(step.name, gradients, hands_on=step.hands_on, late=product)
            if not step.makes_gradients:
                moments.append(At(came, -cast, 0, now + beside + step.working_bytes, left))
            own = sum(n for w, n in step.weights.items() if w not in seen)
            seen |= step.weights.keys()
            came += own
            cast += sum(step.weights[w] for w in casts[step.name])
            ahead.discard(step.name)
            if step.name in extras:
                extras.remove(step.name)
                now -= step.extra_bytes
            release(step.name, step.keeps)
            if own:
                left = late + waiting.late_bytes()
                moments.append(At(came, -cast, own, now + waiting.total, left))
        return worst, worst_of(moments)

    def values(self) -> list[str]:
        return [*self.inputs, *self.steps]


AXES = ("tensor", "context", "expert")


def flow_of(
    unit: Unit, where: Group, machine: Machine, width: int, inner: Mapping[str, Group]
) -> Flow:
    """`unit`: lowered, on one rank's shapes. `where`: the tensor ranks; `inner`: groups of the axes
    that operators send over; `width`: bytes of an element in the compute type."""
    own = _weights(unit)
    roots: dict[fx.Node, str | None] = {}
    inputs: dict[str, int] = {}
    steps: dict[str, Step] = {}
    for node in unit.graph.nodes:
        if node.op == "placeholder":
            roots[node] = None if is_integer(node) else node.name
            if not is_integer(node):
                inputs[node.name] = width * numel(shape_of(node))
        elif node.op == "get_attr":
            roots[node] = None
        elif node.op == "call_function" and node.target is pick:
            roots[node] = node.name
            steps[node.name] = _picked(node, roots, own, where, machine, width, inner)
        elif node.op == "call_function" and any(u.target is pick for u in node.users):
            roots[node] = None
        elif node.op == "call_function" and _is_view(node):
            roots[node] = roots[tensor_operands(node)[0]]
        elif node.op == "call_function":
            roots[node] = node.name
            steps[node.name] = _step(node, roots, own, where, machine, width, inner)
    return Flow(steps, inputs, roots[unit.result()] or "", machine)


def _weights(unit: Unit) -> dict[str, int]:
    """Elements of those that are the unit's own."""
    sizes = {str(n.target): numel(shape_of(n)) for n in parameter_nodes(unit)}
    return {p: size for p, size in sizes.items() if unit.parameters[p].tied is None}


def _is_view(node: fx.Node) -> bool:
    """Whether the result lies in its operand's storage."""
    if collective.is_collective(node):
        move: collective.Move = node.meta["move"]
        return move.conversion.forward is Collective.NONE or move.have.kind is Kind.SHADOW
    return entry_of(node).alias


def _before_gather(node: fx.Node, machine: Machine) -> fx.Node:
    """What is kept of an operand: where a gather is repeated, what it gathers."""
    if not (machine.regathers and collective.is_collective(node)):
        return node
    move: collective.Move = node.meta["move"]
    repeats = move.conversion.forward is Collective.ALL_GATHER
    return tensor_operands(node)[0] if repeats else node


def _picked(
    node: fx.Node,
    roots: dict[fx.Node, str | None],
    own: Mapping[str, int],
    where: Group,
    machine: Machine,
    width: int,
    inner: Mapping[str, Group],
) -> Step:
    """One of several results of a kernel; the first one stands for the kernel."""
    kernel, number = node.args
    assert isinstance(kernel, fx.Node) and isinstance(kernel.target, Kernel), "a kernel's result"
    whole = _step(kernel, roots, own, where, machine, width, inner)
    size = width * numel(shape_of(node))
    outputs = kernel.target.group.outputs
    assert isinstance(number, int), "a result's place"
    kept = {node.name} if outputs[number] in kernel.target.group.kept_outputs else set()
    if number:
        return Step(node.name, node, size, whole.reads, keeps=frozenset(kept))
    return replace(whole, name=node.name, node=node, size_bytes=size, keeps=whole.keeps | kept)


def _step(
    node: fx.Node,
    roots: dict[fx.Node, str | None],
    own: Mapping[str, int],
    where: Group,
    machine: Machine,
    width: int,
    inner: Mapping[str, Group],
) -> Step:
    operands = tensor_operands(node)
    reads = tuple(dict.fromkeys(r for o in operands if (r := roots[o]) is not None))
    size = width * numel(shape_of(node))
    if collective.is_collective(node):
        move: collective.Move = node.meta["move"]
        whole = width * numel(move.whole_shape)
        spent = priced_move(move.conversion, whole, where, machine).forward_s
        sends = ((move.axis, str(move.conversion.forward), whole, 1),)
        step, both = move.conversion, (move.have, move.want, whole, move.ranks)
        of_operand = width * numel(shape_of(operands[0]))
        gradients = size + of_operand + ordered_bytes(step.backward, *both)
        hands_on = step.backward is Collective.NONE
        return Step(
            node.name,
            node,
            size,
            reads,
            working_bytes=0 if hands_on else gradients,
            making_bytes=ordered_bytes(step.forward, *both),
            hands_on=hands_on,
            sent_s={"tensor": spent},
            sends=() if step.forward is Collective.SLICE else sends,
        )
    shapes = shapes_of(node)
    cost = operator_cost(node, shapes, machine, width)
    makes = entry_of(node).forward_buffers
    kept = [roots[_before_gather(operands[i], machine)] for i in cost.saved.operands]
    kept += [node.name] if cost.saved.result else []
    sent: dict[str, float] = {}
    found: list[tuple[str, str, int, int]] = []
    for one in sent_by(node, shapes):
        forward_s, _ = operator_sends_s(one, cost, inner, machine, width)
        sent[one.axis] = sent.get(one.axis, 0.0) + forward_s
        if one.elements_forward and inner[one.axis].ranks > 1:
            found.append((one.axis, str(one.kind), width * one.elements_forward, one.count))
    return Step(
        node.name,
        node,
        size,
        reads,
        keeps=frozenset(v for v in kept if v is not None),
        extra_bytes=cost.saved.extra_bytes,
        working_bytes=cost.working_bytes,
        hands_on=entry_of(node).hands_on,
        making_bytes=makes(node, shapes, width) if makes is not None else 0,
        weights={w: n for w, n in own.items() if w in weights_read(node)},
        casts=frozenset(kept_weights(node, cost) & own.keys()),
        makes_gradients=entry_of(node).makes_gradients,
        computing_s=cost.forward_s,
        flops=cost.flops,
        sent_s=sent,
        sends=tuple(found),
    )
