"""Fuse element-wise and row-reducing operators of a lowered unit into kernels.

before: a graph on one rank's tensors, one operator a node
after:  groups of operators are one node each, a Kernel; of several results each is picked out
needs:  every operator of a group has a formula and results of one shape; no path leaves the group
        and comes back; scopes that it does not share are inside it whole; all of it is computed
        again in a backward, or none of it
saves:  what operators of a group hand each other is neither written nor read

Greedy: of all pairs of groups that may become one, the pair that saves the most bytes, forward and
backward together, until none saves any.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from torch import fx

from llmspec.compiler.graph import Unit, has_rows
from llmspec.compiler.kernels.group import Group, formula_of, place_of, root
from llmspec.compiler.kernels.kernel import Kernel, pick
from llmspec.compiler.kernels.kinds import TRITON
from llmspec.compiler.kernels.measured import NOTHING, Measured
from llmspec.compiler.kernels.tiles import fits
from llmspec.compiler.ops import collective, elementwise, linear
from llmspec.compiler.ops.registry import (
    REGISTRY,
    entry_of,
    numel,
    shape_of,
    shapes_of,
    tensor_operands,
)
from llmspec.compiler.ops.shape import select

Again = Collection[str]
"""Names of operators whose values a use of the unit drops and computes again."""
PICKED = "_picked"
"""What the name of one of several results ends in."""
NOMINAL = 2
"""Bytes of an element when groups are weighed against each other."""


def fusible(node: fx.Node) -> bool:
    if node.op != "call_function" or collective.is_collective(node):
        return False
    entry = REGISTRY.get(node.target)  # type: ignore[arg-type]
    if entry is None or entry.formula is None or has_rows(node):
        return False
    shape = shape_of(node)
    if len(shape) < 2 or shape[-1] < 2 or numel(shape) == 0:
        return False
    operands = tensor_operands(node)
    if any(_strided(o) for o in operands):
        return False
    return all(place_of(shape_of(o), shape) is not None for o in operands if not _drawn(node, o))


def _drawn(node: fx.Node, operand: fx.Node) -> bool:
    return formula_of(node).draws and bool(operand.meta.get("integer"))


def _strided(node: fx.Node) -> bool:
    """A view whose elements do not lie one after the other: a kernel would need a copy."""
    while node.op == "call_function" and entry_of_or_none(node) and entry_of(node).alias:
        if node.target is select:
            return True
        node = tensor_operands(node)[0]
    return False


def entry_of_or_none(node: fx.Node):  # type: ignore[no-untyped-def]
    return None if collective.is_collective(node) else entry_of(node)


def eager_bytes(node: fx.Node, width: int = NOMINAL) -> tuple[float, float]:
    """What an operator by itself moves, forward and backward."""
    if in_product(node):  # its sum is part of the product; backward the gradient is summed
        return 0, width * numel(shape_of(node))
    entry, shapes = entry_of(node), shapes_of(node)
    if entry.moved is not None:
        return entry.moved(node, shapes, width, frozenset())
    read = sum(width * numel(s) for s in shapes.operands)
    result, extra = width * numel(shapes.result), entry.saved(node, shapes).extra_bytes
    kept = entry.saved(node, shapes)
    back = sum(width * numel(shapes.operands[i]) for i in kept.operands)
    back += result if kept.result else 0
    gradients = read if entry.function not in (elementwise.add, elementwise.subtract) else 0
    if not gradients:  # whose gradients are what comes in, but for what is summed
        small = [s for s in shapes.operands if numel(s) < numel(shapes.result)]
        return read + result, sum(result + width * numel(s) for s in small)
    return read + result + extra, result + back + gradients + extra


def in_product(node: fx.Node) -> bool:
    """Whether PyTorch adds it as the bias of a product."""
    if node.target is not elementwise.add:
        return False
    first, second = node.args
    if not isinstance(second, fx.Node):
        return False
    if not isinstance(first, fx.Node) or first.op != "call_function":
        return False
    plain = first.target is linear.linear and len(shape_of(first.args[1])) == 2  # type: ignore[arg-type]
    return plain and len(first.users) == 1 and second.op == "get_attr"


@dataclass
class _Fuser:
    unit: Unit
    again: Sequence[Again]
    one_result: bool = False
    order: dict[fx.Node, int] = field(default_factory=dict)
    made: dict[tuple[fx.Node, ...], Group] = field(default_factory=dict)
    part_of: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order = {n: i for i, n in enumerate(self.unit.graph.nodes)}
        self.scopes: dict[tuple[str, ...], set[fx.Node]] = {}
        for node in self.unit.calls():
            scope = node.meta["scope"]
            for depth in range(1, len(scope) + 1):
                self.scopes.setdefault(scope[:depth], set()).add(node)
        self.keepers = {n: kept_by(n) for n in self.unit.calls()}

    # -- groups and what they move

    def group(self, members: Collection[fx.Node]) -> Group:
        key = tuple(sorted(members, key=self.order.__getitem__))
        if key not in self.made:
            kept = {v for n, vs in self.keepers.items() if n not in members for v in vs}
            self.made[key] = Group(key, frozenset(kept))
        return self.made[key]

    def moved(self, members: Collection[fx.Node]) -> float:
        """Forward and backward. An operator by itself stays as it is where a kernel of its own
        gains nothing."""
        if len(members) > 1 or self._gains_alone(members):
            return self.kernel_bytes(members)
        (node,) = members
        return sum(eager_bytes(node))

    def kernel_bytes(self, members: Collection[fx.Node]) -> int:
        group = self.group(members)
        return group.forward_bytes(NOMINAL) + group.backward_bytes(NOMINAL)

    def accumulated(self, left: frozenset[fx.Node], right: frozenset[fx.Node]) -> int:
        """Of gradients that two groups each give to a value, and one group in one: what adding them
        up moves."""
        both = left | right
        total = 0
        for value in _read(left) | _read(right):
            if value.meta.get("integer"):
                continue
            parts = [self.part_of.get(u, frozenset([u])) for u in value.users]
            apart = {left if p == left else right if p == right else p for p in parts}
            outside = apart - {left, right}
            read_by_both = value not in both and bool(apart & {left, right})
            joint = {both} if read_by_both else set()
            own = left if value in left else right if value in right else frozenset()
            before = max(len(apart - {own}) - 1, 0)
            after = max(len(outside | joint) - 1, 0)
            total += (before - after) * 3 * NOMINAL * numel(shape_of(value))
        return total

    # -- what may be one

    def legal(self, members: Collection[fx.Node]) -> bool:
        if len(members) == 1:
            return True
        nodes = set(members)
        if any(formula_of(n).alone for n in nodes) or len({shape_of(n) for n in nodes}) > 1:
            return False
        if sum(formula_of(n).draws for n in nodes) > 1:
            return False
        if not self._whole_scopes(nodes) or not self._convex(nodes):
            return False
        runs = [[n.name in again for n in nodes] for again in self.again]
        if any(any(r) and not all(r) for r in runs):
            return False
        group = self.group(nodes)
        if (self.one_result or any(any(r) for r in runs)) and len(group.outputs) > 1:
            return False
        return self._sound(group)

    def _whole_scopes(self, nodes: set[fx.Node]) -> bool:
        shared = common_scope(nodes)
        inside = {n.meta["scope"][: len(shared) + 1] for n in nodes}
        return all(self.scopes[s] <= nodes for s in inside if len(s) > len(shared))

    def _convex(self, nodes: set[fx.Node]) -> bool:
        """No path from the group out and back in, other groups being one step."""
        todo = [u for n in nodes for u in n.users if u not in nodes]
        seen: set[fx.Node] = set()
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            if node in nodes:
                return False
            together = self.part_of.get(node, frozenset([node]))
            if together & nodes:
                together = frozenset([node])
            seen |= together
            todo += [u for n in together for u in n.users]
        return True

    # -- the search

    def run(self) -> list[Group]:
        parts = [frozenset([n]) for n in self.unit.calls() if fusible(n)]
        while merged := self._best(parts):
            self.part_of |= dict.fromkeys(merged[0] | merged[1], merged[0] | merged[1])
            left, right = merged
            parts = [p for p in parts if p not in merged] + [left | right]
        found = [self.group(p) for p in parts if len(p) > 1 or self._gains_alone(p)]
        return sorted(found, key=lambda g: self.order[g.members[-1]])

    def _gains_alone(self, part: Collection[fx.Node]) -> bool:
        """Where PyTorch has several kernels for one operator, or one that falls behind."""
        (node,) = part
        if entry_of(node).moved is None or not self._sound(self.group(part)):
            return False
        return self.kernel_bytes(part) < sum(eager_bytes(node))

    def _sound(self, group: Group) -> bool:
        whole = any(i.place.full and i.place.columns for i in group.inputs)
        return group.distinct and whole and fits(group)

    def _best(
        self, parts: list[frozenset[fx.Node]]
    ) -> tuple[frozenset[fx.Node], frozenset[fx.Node]] | None:
        best, gain = None, 0.0
        for left, right in self._pairs(parts):
            both = left | right
            if not self.legal(both):
                continue
            saved = self.moved(left) + self.moved(right) - self.moved(both)
            saved += self.accumulated(left, right)
            if saved > gain:
                best, gain = (left, right), saved
        return best

    def _pairs(
        self, parts: list[frozenset[fx.Node]]
    ) -> Iterator[tuple[frozenset[fx.Node], frozenset[fx.Node]]]:
        """Groups of which one reads the other, or that read the same."""
        for left, right in combinations(parts, 2):
            reads, others = _read(left), _read(right)
            if reads & (right | others) or others & left:
                yield left, right


def _read(part: frozenset[fx.Node]) -> set[fx.Node]:
    return {a for n in part for a in tensor_operands(n) if a.op != "get_attr"}


def common_scope(nodes: Collection[fx.Node]) -> tuple[str, ...]:
    scopes = [n.meta["scope"] for n in nodes]
    shared: tuple[str, ...] = scopes[0]
    for scope in scopes[1:]:
        same = [a == b for a, b in zip(shared, scope, strict=False)]
        shared = shared[: same.index(False) if False in same else len(same)]
    return shared


def kept_by(node: fx.Node) -> set[fx.Node]:
    """Values that autograd keeps for a node's backward."""
    if collective.is_collective(node):
        return set()
    kept = entry_of(node).saved(node, shapes_of(node))
    operands = tensor_operands(node)
    found = {root(operands[i]) for i in kept.operands}
    return found | ({root(node)} if kept.result else set())


# --------------------------------------------------------------------------------------------------
# The graph with kernels


def fuse_unit(
    unit: Unit,
    again: Sequence[Again] = (),
    *,
    one_result: bool = False,
    measured: Measured = NOTHING,
    by: str = TRITON,
) -> Unit:
    """`unit`: lowered. `again`: of each of its uses, what it computes again in its backward; lists
    of names alone matter. one_result: of every kernel, so that each may be computed again. by: what
    makes the kernels. measured: of Triton's; groups that were slower as one kernel than as
    PyTorch's operators stay apart."""
    measured = measured if by == TRITON else NOTHING
    groups = [g for g in _Fuser(unit, again, one_result).run() if not measured.apart(g)]
    if not groups:
        return unit
    return _rewrite(unit, groups, measured, by)


def _rewrite(unit: Unit, groups: list[Group], measured: Measured, by: str) -> Unit:
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    of = {n: g for g in groups for n in g.members}
    waiting = list(_in_order(unit, of))
    for item in waiting:
        if isinstance(item, Group):
            _add_kernel(graph, Kernel.of(item, by, measured.rates(item)), new)
        elif item.op == "output":
            graph.output(new[unit.result()])
        else:
            new[item] = graph.node_copy(item, new.__getitem__)
            new[item].meta = dict(item.meta)
    return Unit(
        name=unit.name,
        graph=graph,
        inputs=unit.inputs,
        span=unit.span,
        parameters=unit.parameters,
    )


def _in_order(unit: Unit, of: dict[fx.Node, Group]) -> Iterator[fx.Node | Group]:
    """Each as soon as what it reads is there, in the unit's order as far as that goes."""
    done: set[fx.Node] = set()
    left = list(unit.graph.nodes)
    while left:
        for node in left:
            group = of.get(node)
            members = group.members if group else (node,)
            read = {a for n in members for a in n.all_input_nodes} - set(members)
            if read <= done and not (node.op == "output" and len(left) > 1):
                break
        else:
            raise AssertionError("groups have no paths out and back in")
        done |= set(members)
        left = [n for n in left if n not in members]
        yield group or node


def _add_kernel(graph: fx.Graph, kernel: Kernel, new: dict[fx.Node, fx.Node]) -> None:
    group = kernel.group
    args = tuple(new[i.node] for i in group.inputs if i.node is not None)
    drawn = [o for n in group.members for o in tensor_operands(n) if _drawn(n, o)]
    args += tuple(new[o] for o in drawn)
    last = group.outputs[-1].node
    node = graph.create_node("call_function", kernel, args, name=last.name)
    node.meta = dict(last.meta) | {"scope": common_scope(group.members)}
    node.meta["span"] = next((n.meta["span"] for n in group.members if n.meta.get("span")), None)
    if len(group.outputs) == 1:
        new[last] = node
        return
    for i, output in enumerate(group.outputs):
        picked = graph.create_node(
            "call_function", pick, (node, i), name=f"{output.node.name}{PICKED}"
        )
        picked.meta = dict(output.node.meta) | {"scope": node.meta["scope"]}
        new[output.node] = picked


def members_of(unit: Unit) -> dict[str, tuple[str, ...]]:
    """By the names of nodes of a fused unit, the operators that each stands for."""
    return {
        n.name: tuple(m.name for m in n.target.group.members)
        if isinstance(n.target, Kernel)
        else (n.name,)
        for n in unit.calls()
    }
