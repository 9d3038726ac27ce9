"""One group of operators as one kernel: its expressions forward, backward, and what it keeps.

The backward is derived: reverse mode over the operators' own derivatives. What is kept for it is a
smallest cut between the group's inputs and what the backward reads of the forward, in bytes: all
behind the cut is computed again inside the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import networkx as nx
from torch import fx

from llmspec.compiler.graph import without_gradient
from llmspec.compiler.ops.formula import OVER_COLUMNS, Expr, Extra, Formula, Maker, in_order
from llmspec.compiler.ops.registry import REGISTRY, Shape, numel, shape_of, tensor_operands

NEVER = 10**18
"""Bytes of what cannot be kept."""
WIDE = 4
"""Bytes of a row's statistic, of a table, and of a partial sum."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value stands on rows × columns.

    rows: how many it has; 0: the same for all. They run along the dimensions first to stop of the
        whole value's, its last left out. full: a row for each of the grid's.
    """

    rows: int
    columns: bool
    first: int = 0
    stop: int = 0
    full: bool = False


def place_of(shape: Shape, whole: Shape) -> Place | None:
    """Of an operand that is broadcast to `whole`; None when no such row arithmetic says it."""
    if tuple(shape) == tuple(whole):
        return Place(numel(whole[:-1]), True, 0, len(whole) - 1, True)
    padded = (1,) * (len(whole) - len(shape)) + tuple(shape)
    if padded[-1] not in (1, whole[-1]) or len(shape) > len(whole):
        return None
    columns = padded[-1] == whole[-1]
    lead, there = whole[:-1], padded[:-1]
    along = [i for i, (w, p) in enumerate(zip(lead, there, strict=True)) if p == w and w > 1]
    if any(p not in (1, w) for w, p in zip(lead, there, strict=True)):
        return None
    if not along:
        return Place(0, True) if columns else None
    first, stop = along[0], along[-1] + 1
    if any(there[i] != lead[i] for i in range(first, stop)):
        return None
    return _place(lead, first, stop, columns)


def _place(lead: Shape, first: int, stop: int, columns: bool) -> Place:
    rows = numel(lead[first:stop])
    return Place(rows, columns, first, stop, rows == numel(lead)) if rows > 1 else Place(0, columns)


def extra_place(extra: Extra, whole: Shape) -> Place:
    first, stop = extra.per
    rows = numel(whole[first:stop])
    return Place(rows, extra.columns, first, stop, rows == numel(whole[:-1]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """What a kernel reads. node: where it comes from; None: an operator's extra.

    size: its elements.
    """

    name: str
    place: Place
    size: int
    node: fx.Node | None = None
    extra: Extra | None = None
    expr: Expr

    @property
    def integer(self) -> bool:
        return self.extra is not None and self.extra.integer

    @property
    def differentiable(self) -> bool:
        return self.node is not None

    @property
    def parameter(self) -> bool:
        return self.node is not None and self.node.op == "get_attr"


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    node: fx.Node
    name: str
    expr: Expr


@dataclass(eq=False)
class Group:
    """Operators of one lowered unit that one kernel computes, in the unit's order.

    kept_anyway: values that autograd keeps for others whatever this group does.
    """

    members: tuple[fx.Node, ...]
    kept_anyway: frozenset[fx.Node] = frozenset()
    maker: Maker = field(default_factory=Maker)
    exprs: dict[fx.Node, Expr] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    name: str = ""

    def __post_init__(self) -> None:
        names: set[str] = set()
        operands: dict[fx.Node, list[Expr]] = {}
        for node in self.members:
            for operand in tensor_operands(node):
                if operand not in self.exprs and not without_gradient(operand):
                    self._input(operand, names)
            operands[node] = self._operands(node, names)
            made = formula_of(node).value(node, self.maker, operands[node])
            label = "result" if formula_of(node).alone else str(node.meta["label"])
            self.exprs[node] = made.named(_unused(label, names))
        self._operands_of = operands
        # as calls have them: tensors, then tables and places; a mask is an argument of its own
        self.inputs.sort(key=lambda i: i.extra is not None and not i.extra.drawn)

    # -- what goes in

    @property
    def whole(self) -> Shape:
        return shape_of(self.members[0])

    @property
    def rows(self) -> int:
        return numel(self.whole[:-1])

    @property
    def columns(self) -> int:
        return self.whole[-1]

    def _input(self, node: fx.Node, names: set[str]) -> None:
        place = place_of(shape_of(node), self.whole)
        assert place is not None, "the fuser takes only what can be placed"
        alone = formula_of(self.members[0]).alone
        name = _unused("x" if alone else str(node.meta["label"]), names)
        leaf = self.maker.leaf(name, rows=place.rows > 0, columns=place.columns)
        self.exprs[node] = leaf
        size = numel(shape_of(node))
        self.inputs.append(Input(name=name, place=place, size=size, node=node, expr=leaf))

    def _operands(self, node: fx.Node, names: set[str]) -> list[Expr]:
        found: list[Expr] = []
        for value in node.args:
            if isinstance(value, fx.Node):
                if not without_gradient(value):
                    found.append(self.exprs[value])
            elif isinstance(value, (int, float)):
                found.append(self.maker.number(value))
        for extra in formula_of(node).extras(node):
            place = extra_place(extra, self.whole)
            name = _unused(extra.name, names)
            leaf = self.maker.leaf(name, rows=place.rows > 0, columns=place.columns)
            size = max(place.rows, 1) * (self.columns if place.columns else 1)
            self.inputs.append(Input(name=name, place=place, size=size, extra=extra, expr=leaf))
            found.append(leaf)
        return found

    # -- what comes out

    @cached_property
    def outputs(self) -> list[Output]:
        """Values that others read."""
        own = set(self.members)
        return [
            Output(node=n, name=self.exprs[n].label, expr=self.exprs[n])
            for n in self.members
            if any(u not in own for u in n.users)
        ]

    # -- the backward

    @cached_property
    def incoming(self) -> dict[Expr, Expr]:
        """Leaf of each output's gradient."""
        return {
            o.expr: self.maker.leaf(f"d_{o.name}", rows=True, columns=True) for o in self.outputs
        }

    @cached_property
    def gradients(self) -> dict[Input, Expr]:
        """Of each input that is no extra. What is repeated over some rows only has its gradient row
        by row here, and is summed by who asked."""
        total: dict[Expr, Expr] = {}

        def add(of: Expr, more: Expr) -> None:
            total[of] = self._sum(total[of], more) if of in total else more

        for output in self.outputs:
            add(output.expr, self.incoming[output.expr])
        for node in reversed(self.members):
            own = self.exprs[node]
            g, operands = total[own], self._operands_of[node]
            parts = formula_of(node).gradient(node, self.maker, operands, own, g)
            for operand, part in zip(operands, parts, strict=False):
                if part is None or operand.op == "number":
                    continue
                width = self.columns
                add(
                    operand,
                    self.maker.sum_to(
                        part, rows=operand.rows, columns=operand.columns, width=width
                    ),
                )
        found = {i: total[i.expr] for i in self.inputs if i.differentiable}
        for i, made in found.items():
            if made.op != "leaf":
                made.named(f"d_{i.name}")
        return found

    def _sum(self, a: Expr, b: Expr) -> Expr:
        """Sums over rows are the last thing that happens to a value."""
        if a.op == b.op == "column_sum":
            inner = a.args[0] + b.args[0]
            return self.maker.make("column_sum", (inner,), rows=False, columns=a.columns)
        return a + b

    @property
    def distinct(self) -> bool:
        """Whether each operator computes something of its own."""
        found = [self.exprs[n] for n in self.members] + [i.expr for i in self.inputs]
        return len({id(e) for e in found}) == len(found)

    @cached_property
    def of_gradients(self) -> set[int]:
        """Ids of expressions that depend on a gradient."""
        leaves = {id(e) for e in self.incoming.values()}
        out = set(leaves)
        for e in in_order(self.gradients.values()):
            if any(id(a) in out for a in e.args):
                out.add(id(e))
        return out

    @cached_property
    def kept(self) -> list[Expr]:
        """What the backward reads of the forward: a smallest cut in bytes."""
        wanted = self._wanted()
        if not wanted:
            return []
        inside = in_order(o.expr for o in self.outputs)
        graph = nx.DiGraph()
        for e in in_order(wanted):
            if e.op == "number":
                continue
            cost = self._keeping(e) if any(e is i for i in inside) else NEVER
            graph.add_edge((id(e), 0), (id(e), 1), capacity=cost)
            if e.op == "leaf":
                graph.add_edge("start", (id(e), 0), capacity=NEVER)
            for a in e.args:
                if a.op != "number":
                    graph.add_edge((id(a), 1), (id(e), 0), capacity=NEVER)
        for e in wanted:
            graph.add_edge((id(e), 1), "end", capacity=NEVER)
        _, (before, _) = nx.minimum_cut(graph, "start", "end")
        cut = [
            e
            for e in in_order(wanted)
            if e.op != "number" and (id(e), 0) in before and (id(e), 1) not in before
        ]
        return cut

    def _wanted(self) -> list[Expr]:
        """Of the forward's values, those that the backward's own expressions read."""
        found: dict[int, Expr] = {}
        for e in in_order(self.gradients.values()):
            if id(e) in self.of_gradients:
                found |= {id(a): a for a in e.args if id(a) not in self.of_gradients}
        for made in self.gradients.values():
            if id(made) not in self.of_gradients:
                found[id(made)] = made
        return [e for e in found.values() if e.op != "number"]

    def _keeping(self, e: Expr) -> int:
        """Bytes, in a compute type of two: only which is more matters. Of equal ones what need not
        be written for this alone, then the fewest values."""
        for i in self.inputs:
            if i.expr is e:
                free = i.node is None or i.parameter or root(i.node) in self.kept_anyway
                return 1 + (0 if free else 8 * i.size)
        if any(root(n) in self.kept_anyway for n in self.members if self.exprs[n] is e):
            return 1
        written = any(o.expr is e for o in self.outputs)
        size = self.elements(e) * (2 if e.columns else WIDE)
        return 1 + (4 if written else 5) * size

    def elements(self, e: Expr) -> int:
        return (self.rows if e.rows else 1) * (self.columns if e.columns else 1)

    @cached_property
    def kept_inputs(self) -> list[Input]:
        return [i for i in self.inputs if any(i.expr is e for e in self.kept)]

    @cached_property
    def kept_outputs(self) -> list[Output]:
        return [o for o in self.outputs if any(o.expr is e for e in self.kept)]

    @cached_property
    def kept_inside(self) -> list[Expr]:
        """Values that are written for the backward alone."""
        known = [i.expr for i in self.inputs] + [o.expr for o in self.outputs]
        return [e for e in self.kept if not any(e is k for k in known)]

    @cached_property
    def distinct_gradients(self) -> list[Expr]:
        """What the backward writes: equal gradients once, those that come in not at all."""
        coming = set(map(id, self.incoming.values()))
        found = {id(e): e for e in self.gradients.values() if id(e) not in coming}
        return list(found.values())

    # -- bytes

    def forward_bytes(self, width: int) -> int:
        """Read and written, each once."""
        read = sum(self._input_bytes(i, width) for i in self.inputs)
        return read + sum(self.bytes_of(e, width) for e in self.written)

    def read_again_bytes(self, width: int) -> int:
        """What the backward reads a second time where a sum over rows is a kernel of its own, as
        inductor has it unless rows are reduced in the same pass (its mixed-order reductions, on
        since PyTorch 2.10): the value that is summed if it is written, else what makes it."""
        written = {id(e) for e in self.distinct_gradients}
        whole = {id(e) for e in in_order(self.distinct_gradients) if e.op in OVER_COLUMNS}
        total = 0
        for e in self.distinct_gradients if not whole else ():
            if e.op == "column_sum":
                (summed,) = e.args
                read = [summed] if id(summed) in written else _leaves(summed)
                total += sum(self.bytes_of(one, width) for one in read)
        return total

    @cached_property
    def written(self) -> list[Expr]:
        return [o.expr for o in self.outputs] + self.kept_inside

    def backward_bytes(self, width: int) -> int:
        read = sum(self.bytes_of(e, width) for e in self.read_backward)
        read += sum(self._input_bytes(i, width) for i in self.kept_inputs)
        return read + sum(self.bytes_of(e, width) for e in self.distinct_gradients)

    @cached_property
    def read_backward(self) -> list[Expr]:
        """Gradients that come in and are looked at, and kept values that are no inputs."""
        needed = {id(e) for e in in_order(self.distinct_gradients)}
        coming = [e for e in self.incoming.values() if id(e) in needed]
        return coming + [o.expr for o in self.kept_outputs] + self.kept_inside

    def _input_bytes(self, i: Input, width: int) -> int:
        return i.size * (8 if i.integer else width if i.differentiable else WIDE)

    def bytes_of(self, e: Expr, width: int) -> int:
        return self.elements(e) * (width if e.columns and e.rows else max(width, WIDE))

    @property
    def draws(self) -> bool:
        return any(formula_of(n).draws for n in self.members)

    def structure(self) -> str:
        """The same for groups that the same kernel computes."""
        number: dict[int, str] = {}
        lines = []
        leaves = [i.expr for i in self.inputs]
        roots = [*leaves, *self.written, *self.incoming.values(), *self.gradients.values()]
        for e in in_order(roots):
            number[id(e)] = str(len(number))
            args = ",".join(number[id(a)] for a in e.args)
            value = "" if e.op == "leaf" else e.value
            lines.append(f"{e.op}({args}){value}{e.rows:d}{e.columns:d}")
        kept = ",".join(number[id(e)] for e in self.kept)
        places = ";".join(
            f"{number[id(i.expr)]}{i.integer}{_pattern(i, self.whole)}" for i in self.inputs
        )
        ends = ",".join(number[id(e)] for e in roots)
        return "\n".join([*lines, kept, places, ends])


def _leaves(e: Expr) -> list[Expr]:
    return [one for one in in_order([e]) if one.op == "leaf" and one.rows]


def _pattern(i: Input, whole: Shape) -> tuple[object, ...]:
    p = i.place
    return (p.full,) if p.full or not p.rows else (p.first, p.stop, len(whole))


def formula_of(node: fx.Node) -> Formula:
    found = REGISTRY[node.target].formula  # type: ignore[index]
    assert found is not None, "only operators with a formula are in groups"
    return found


def root(node: fx.Node) -> fx.Node:
    """Whose memory a value lies in."""
    while node.op == "call_function" and node.target in REGISTRY and REGISTRY[node.target].alias:
        node = tensor_operands(node)[0]
    return node


def _unused(label: str, names: set[str]) -> str:
    name, number = label, 2
    while name in names:
        name, number = f"{label}_{number}", number + 1
    names.add(name)
    return name
