"""Print one scope of a lowered unit as the statements of a `forward`.

A scope is the path of operator instances that nodes carry. A child scope that is large enough,
closed and
has one result becomes a module of its own; smaller ones are written out in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx

from llmspec.compiler.emit.again import call_again
from llmspec.compiler.graph import Unit
from llmspec.compiler.kernels.kernel import pick
from llmspec.compiler.ops import collective, elementwise, linear
from llmspec.compiler.ops.collective import Move
from llmspec.compiler.ops.registry import Localised, entry_of

Scope = tuple[str, ...]
SMALLEST_MODULE = 4
"""Operators below which a child scope is written out in place: one norm is not worth a class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A child scope printed as a module: its nodes, what it reads from outside, its one result."""

    scope: Scope
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    result: fx.Node


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One scope, ready to print: plain nodes and children in an order that respects the data."""

    scope: Scope
    inputs: tuple[fx.Node, ...]
    items: tuple[fx.Node | Child, ...]
    result: fx.Node
    parameters: tuple[fx.Node, ...]

    def children(self) -> tuple[Child, ...]:
        return tuple(i for i in self.items if isinstance(i, Child))


# --------------------------------------------------------------------------------------------------
# Scopes into sections


def _computes(nodes: tuple[fx.Node, ...]) -> int:
    return sum(
        n.op == "call_function" and not collective.is_collective(n) and not entry_of(n).alias
        for n in nodes
    )


def _reached(start: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """Everything downstream of `start`, through nodes of `inside`."""
    seen: set[fx.Node] = set()
    todo = [start]
    while todo:
        for user in todo.pop().users:
            if user in inside and user not in seen:
                seen.add(user)
                todo.append(user)
    return seen


def _child(scope: Scope, nodes: tuple[fx.Node, ...], all_nodes: set[fx.Node]) -> Child | None:
    """The child as a module; None when it is too small, has several results, or is not closed."""
    own = set(nodes)
    calls = [n for n in nodes if n.op == "call_function"]
    results = [n for n in calls if any(u not in own for u in n.users)]
    weights = [n.meta["parameter"] for n in nodes if n.op == "get_attr"]
    # what expert ranks have split is gathered by itself, as a module that is called
    own_unit = any(w.expert_ranks > 1 for w in weights)
    if len(results) != 1 or (_computes(nodes) < SMALLEST_MODULE and not own_unit):
        return None
    outside = all_nodes - own
    after = _reached(results[0], outside)
    if any(user in own for n in after for user in n.users):
        return None
    inputs = dict.fromkeys(
        a for n in calls for a in n.all_input_nodes if a not in own and a.op != "get_attr"
    )
    prefix = ".".join(scope) + "."
    read = [a for n in calls for a in n.all_input_nodes if a.op == "get_attr"]
    if any(a not in own or not a.meta["parameter"].path.startswith(prefix) for a in read):
        return None
    return Child(scope=scope, nodes=nodes, inputs=tuple(inputs), result=results[0])


def _in_order(items: list[fx.Node | Child], order: dict[fx.Node, int]) -> list[fx.Node | Child]:
    """Kahn's order over nodes and children, earliest first."""
    owner: dict[fx.Node, fx.Node | Child] = {}
    for item in items:
        for node in item.nodes if isinstance(item, Child) else (item,):
            owner[node] = item

    def needs(item: fx.Node | Child) -> set[int]:
        nodes = item.nodes if isinstance(item, Child) else (item,)
        read = {a for n in nodes for a in n.all_input_nodes}
        return {id(owner[a]) for a in read if a in owner and owner[a] is not item}

    def place(item: fx.Node | Child) -> int:
        return order[item.result if isinstance(item, Child) else item]

    waiting, done, out = {id(i): needs(i) for i in items}, set[int](), []
    left = sorted(items, key=place)
    while left:
        item = next(i for i in left if waiting[id(i)] <= done)
        left.remove(item)
        done.add(id(item))
        out.append(item)
    return out


def section(
    scope: Scope,
    nodes: tuple[fx.Node, ...],
    *,
    inputs: tuple[fx.Node, ...],
    result: fx.Node,
    order: dict[fx.Node, int],
) -> Section:
    """Sort a scope's nodes into its own and those of children."""
    depth = len(scope)
    groups: dict[str, list[fx.Node]] = {}
    for node in nodes:
        if len(node.meta["scope"]) > depth:
            groups.setdefault(node.meta["scope"][depth], []).append(node)
    items: list[fx.Node | Child] = []
    for name, members in groups.items():
        child = _child((*scope, name), tuple(members), set(nodes))
        items += [child] if child else members
    items += [n for n in nodes if len(n.meta["scope"]) == depth]
    own = [n for n in items if isinstance(n, fx.Node)]
    placed = [i for i in items if isinstance(i, Child) or i.op == "call_function"]
    return Section(
        scope=scope,
        inputs=inputs,
        items=tuple(_in_order(placed, order)),
        result=result,
        parameters=tuple(n for n in own if n.op == "get_attr"),
    )


def unit_section(unit: Unit) -> Section:
    """The whole unit as the outermost section."""
    order = {n: i for i, n in enumerate(unit.graph.nodes)}
    nodes = tuple(n for n in unit.graph.nodes if n.op in ("call_function", "get_attr"))
    inputs = tuple(n for n in unit.graph.nodes if n.op == "placeholder")
    return section((), nodes, inputs=inputs, result=unit.result(), order=order)


def child_section(child: Child, unit: Unit) -> Section:
    order = {n: i for i, n in enumerate(unit.graph.nodes)}
    return section(child.scope, child.nodes, inputs=child.inputs, result=child.result, order=order)


def flat_section(unit: Unit) -> Section:
    """The whole unit with no child modules: everything is written out."""
    return Section(
        scope=(),
        inputs=tuple(n for n in unit.graph.nodes if n.op == "placeholder"),
        items=tuple(n for n in unit.graph.nodes if n.op == "call_function"),
        result=unit.result(),
        parameters=tuple(n for n in unit.graph.nodes if n.op == "get_attr"),
    )


# --------------------------------------------------------------------------------------------------
# Sections into statements


@dataclass(frozen=True, slots=True)
class Statement:
    """`target = text`, with comments above it."""

    target: str
    text: str
    comments: tuple[str, ...] = ()


@dataclass
class Printer:
    """Statements of one section.

    reference: how a parameter node is written (`local(self.q)`). comment: what is said of a
        collective; sent: of an operator that sends by itself.
    """

    section: Section
    reference: Callable[[fx.Node], str]
    comment: Callable[[Move, fx.Node], tuple[str, ...]]
    sent: Callable[[fx.Node], tuple[str, ...]]
    imports: set[tuple[str, str]] = field(default_factory=set)
    again: frozenset[str] = frozenset()
    """Nodes whose values some block drops and computes again."""
    names: dict[fx.Node, str] = field(default_factory=dict)
    free_at: dict[str, int] = field(default_factory=dict)

    def _single(self, node: fx.Node) -> fx.Node | None:
        return next(iter(node.users)) if len(node.users) == 1 else None

    def _inlined(self, node: fx.Node) -> bool:
        """Whether the node is written inside its only reader's expression."""
        user = self._single(node)
        here = set(self.section.items)
        if user is None or user not in here or node is self.section.result:
            return False
        if collective.is_collective(node) or collective.is_collective(user):
            return False
        return entry_of(user).alias or self._biased(user) is node

    def _biased(self, node: fx.Node) -> fx.Node | None:
        """The linear whose bias this addition adds, when the two are one call in PyTorch."""
        if node.op != "call_function" or node.target is not elementwise.add:
            return None
        first, second = node.args
        if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
            return None
        plain = first.op == "call_function" and first.target is linear.linear
        own = first in self.section.items and second.op == "get_attr"
        if not plain or not own or len(first.users) != 1 or first is self.section.result:
            return None
        two_dims = len(first.args[1].meta["parameter"].shape) == 2 if (  # type: ignore[union-attr]
            first.args[1].op == "get_attr"  # type: ignore[union-attr]
        ) else False  # fmt: skip
        apart = (first.name in self.again) != (node.name in self.again)
        return first if two_dims and len(second.meta["shape"]) == 1 and not apart else None

    def expression(self, node: fx.Node) -> str:
        if node.op == "get_attr":
            return self.reference(node)
        if node in self.names:
            return self.names[node]
        return self._call(node)

    def _argument(self, value: object) -> str:
        if not isinstance(value, fx.Node):
            return repr(value)
        text = self.expression(value)
        binary = value.op == "call_function" and value.target in _BINARY
        if binary and value not in self.names and self._biased(value) is None:
            return f"({text})"
        return text

    def _call(self, node: fx.Node) -> str:
        text = self._plain_call(node)
        if node.name not in self.again or node is self._fused_away(node):
            return text
        self.imports.add(("runtime.recompute", "again"))
        return call_again(node.name, text, set(self.names.values()))

    def _fused_away(self, node: fx.Node) -> fx.Node | None:
        """The node itself where its bias's addition is printed in its place."""
        user = self._single(node)
        return node if user is not None and self._biased(user) is node else None

    def _plain_call(self, node: fx.Node) -> str:
        if collective.is_collective(node):
            function = node.target.__name__  # type: ignore[union-attr]
            self.imports.add(("runtime.collectives", function))
            value, *dims = map(self._argument, node.args)
            names = ("dim",) if len(dims) == 1 else ("split_dim", "concat_dim")
            named = [f"{name}={dim}" for name, dim in zip(names, dims, strict=False)]
            return f"{function}({', '.join([value, *named, 'axis=self.tensor'])})"
        product = self._biased(node)
        if product is not None:
            parts = (*product.args, node.args[1])
            made = linear.printed_product(product, *map(self._argument, parts))
            self.imports.update(made.imports)
            return made.text
        local = node.meta.get("localised", Localised())
        printed = entry_of(node).render(node, [self._argument(a) for a in node.args], local)
        self.imports.update(printed.imports)
        return printed.text

    def _reads(self, item: fx.Node | Child) -> set[fx.Node]:
        """The named values that a statement reads, through what is written inside it."""
        out: set[fx.Node] = set()
        todo = list(item.inputs) if isinstance(item, Child) else list(item.all_input_nodes)
        while todo:
            node = todo.pop()
            if node.op == "get_attr":
                continue
            if node.op == "call_function" and node in self._inside:
                todo += node.all_input_nodes
            else:
                out.add(node)
        return out

    def _name(self, node: fx.Node, at: int, label: str | None = None) -> str:
        """`label_DIMS`; a name that another live value holds gets a number."""
        label, dims = label or node.meta["label"], node.meta["dims"]
        base = f"{label}_{dims}" if dims else label
        name, number = base, 2
        while self.free_at.get(name, -1) > at:
            name, number = f"{base}_{number}" if not dims else f"{label}{number}_{dims}", number + 1
        return name

    def statements(self) -> list[Statement]:
        items = list(self.section.items)
        self._inside = {i for i in items if isinstance(i, fx.Node) and self._inlined(i)}
        written = [i for i in items if i not in self._inside and not is_pick(i)]
        last_read: dict[fx.Node, int] = {self.section.result: len(written)}
        for at, item in enumerate(written):
            for node in self._reads(item):
                last_read[node] = max(last_read.get(node, -1), at)
        for node in self.section.inputs:
            self.names[node] = self._name(node, -1)
            self.free_at[self.names[node]] = last_read.get(node, -1)
        out: list[Statement] = []
        for at, item in enumerate(written):
            text, comments = self._text(item)
            names = []
            for node in self._made(item):
                name = self._name(node, at, item.scope[-1] if isinstance(item, Child) else None)
                self.names[node] = name
                self.free_at[name] = last_read.get(node, at)
                names.append(name)
            out.append(Statement(", ".join(names), text, comments))
        if is_pick(self.section.result):
            out.append(Statement("", self.names[self.section.result]))
        return out

    def _made(self, item: fx.Node | Child) -> list[fx.Node]:
        """The values that a statement gives names."""
        if isinstance(item, Child):
            return [item.result]
        picks = sorted((u for u in item.users if is_pick(u)), key=lambda u: int(u.args[1]))  # type: ignore[arg-type]
        return picks or [item]

    def _text(self, item: fx.Node | Child) -> tuple[str, tuple[str, ...]]:
        if isinstance(item, Child):
            path = ".".join(("self", *item.scope[len(self.section.scope) :]))
            return f"{path}({', '.join(self.names[n] for n in item.inputs)})", ()
        if collective.is_collective(item):
            return self._call(item), self.comment(item.meta["move"], item)
        return self._call(item), self._sent(item)

    def _sent(self, node: fx.Node) -> tuple[str, ...]:
        """Of everything that the statement of `node` writes out."""
        inside = [a for a in node.all_input_nodes if a in self._inside]
        return (*(line for a in inside for line in self._sent(a)), *self.sent(node))


def is_pick(item: fx.Node | Child) -> bool:
    """Whether this is one of several results of a kernel."""
    return isinstance(item, fx.Node) and item.target is pick


_BINARY = (elementwise.add, elementwise.subtract, elementwise.multiply, elementwise.divide)
