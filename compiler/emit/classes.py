"""Print a lowered unit as classes: one for the block, one for each operator large enough to have
one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import fx

from llmspec.compiler.emit.again import Choices
from llmspec.compiler.emit.forward import (
    Child,
    Printer,
    Section,
    child_section,
    flat_section,
    unit_section,
)
from llmspec.compiler.graph import Init, Parameter, Unit
from llmspec.compiler.kernels.kernel import Kernel
from llmspec.compiler.ops.collective import Move
from llmspec.compiler.ops.context import context_dropout
from llmspec.compiler.ops.dropout import dropout
from llmspec.compiler.placement import Kind, State, parse_state
from llmspec.compiler.reference import DROPOUTS_PER_INSTANCE
from llmspec.compiler.text import Text, quoted
from llmspec.dsl.program import Span

Comment = Callable[[Move, fx.Node], tuple[str, ...]]
AXES = ("context", "expert", "tensor")
"""That a module's own calls may name."""


@dataclass
class Style:
    """What all classes of one program share.

    cast: whether weights are stored in another type than they are used in, and cast by the module
        itself. stored: the word of that type.
    cast_experts: the same for what the expert ranks have split.
    recompute: by unit, what its uses compute again in the backward.
    sent: what is said of an operator that sends by itself.
    imports: filled while printing.
    """

    source: str
    cast: bool
    cast_experts: bool
    stored: str
    recompute: Mapping[str, Choices]
    comment: Comment
    sent: Callable[[fx.Node], tuple[str, ...]]
    placements: dict[str, dict[str, str]]
    imports: set[tuple[str, str]] = field(default_factory=set)


def place(span: Span) -> str:
    """Where a reader finds it: the file's name alone, or its place in the library."""
    path = span.path if span.path.startswith("library/") else span.path.rpartition("/")[2]
    return f"{quoted(path)}:{span.line}"


def class_name(name: str) -> str:
    words = [w for w in quoted(name).replace(".", "_").replace(" ", "_").split("_") if w]
    text = "".join(w[0].upper() + w[1:] for w in words)
    return text if text.isidentifier() else f"Block{text}"


# --------------------------------------------------------------------------------------------------
# Parameters


def init_text(init: Init, imports: set[tuple[str, str]]) -> str:
    match init.kind:
        case "normal":
            name = "Normal"
            mean = f"mean={init.a!r}, " if init.a else ""
            text = f"Normal({mean}std={init.b!r})"
            if init.additions > 1:
                imports.add(("math", "sqrt"))
                text = f"Normal({mean}std={init.b!r} / sqrt({init.additions}))"
        case "uniform":
            name = "Uniform"
            text = f"Uniform(low={init.a!r}, high={init.b!r})"
        case _:
            name = "Constant"
            text = f"Constant(value={init.a!r})"
    imports.add(("runtime.initialise", name))
    if not init.zero_rows:
        return text
    imports.add(("runtime.initialise", "Rows"))
    return f"Rows(init={text}, zero_rows={init.zero_rows!r})"


def buffer_text(weight: Parameter, style: Style) -> str:
    """A state that is no weight."""
    assert weight.buffer is not None, "only a buffer is one"
    style.imports.add(("runtime.parameters", "buffer"))
    parts = [repr(weight.shape), f"init={init_text(weight.init, style.imports)}"]
    if weight.buffer.rate is not None:
        parts.append(f"rate={weight.buffer.rate!r}")
    if weight.buffer.integer:
        parts.append("dtype=torch.int64")
    if not weight.buffer.kept:
        parts.append("kept=False")
    return f"buffer({', '.join(parts)})"


def parameter_text(weight: Parameter, state: State, style: Style) -> str:
    style.imports.add(("runtime.parameters", "parameter"))
    parts = [repr(weight.shape), "mesh=mesh", f"init={init_text(weight.init, style.imports)}"]
    split = ['"expert": 0'] if weight.expert_ranks > 1 else []
    split += [f'"tensor": {state.dim}'] if state.kind is Kind.SPLIT else []
    if split:
        parts.append(f"split={{{', '.join(split)}}}")
    if state.kind is Kind.SHADOW:
        parts.append("partial=True")
    if style.stored != "fp32":
        parts.append("dtype=STORED")
    if not weight.decay and len(weight.shape) >= 2:
        parts.append("decay=False")
    return f"parameter({', '.join(parts)})"


def member_text(unit: Unit, weight: Parameter, style: Style) -> str:
    """What makes a weight or a buffer of `unit`."""
    if weight.buffer is not None:
        return buffer_text(weight, style)
    state = parse_state(style.placements[unit.name][weight.path])
    return parameter_text(weight, state, style)


Tree = dict[str, "Tree | str"]


def grow(tree: Tree, path: str, text: str) -> None:
    """Put `text` at a dotted path."""
    head, _, rest = path.partition(".")
    if not rest:
        tree[head] = text
        return
    below = tree.setdefault(head, {})
    if not isinstance(below, dict):
        raise ValueError(f"{path} stands below a parameter")
    grow(below, rest, text)


def group_text(tree: Tree, style: Style) -> str:
    style.imports.add(("runtime.parameters", "Group"))
    parts = [f"{k}={v if isinstance(v, str) else group_text(v, style)}" for k, v in tree.items()]
    return f"Group({', '.join(parts)})"


# --------------------------------------------------------------------------------------------------
# Classes


def used_axes(statements: list[str]) -> tuple[str, ...]:
    """The axes of the mesh that some statement names."""
    return tuple(a for a in AXES if any(re.search(rf"\bself\.{a}\b", s) for s in statements))


def has_dropout(nodes: tuple[fx.Node, ...] | list[fx.Node]) -> bool:
    return any(n.op == "call_function" and _drops(n) for n in nodes)


def _drops(node: fx.Node) -> bool:
    if isinstance(node.target, Kernel):
        return any(map(_drops, node.target.group.members))
    return node.target in (dropout, context_dropout)


def _section_nodes(section: Section) -> list[fx.Node]:
    return [i for i in section.items if isinstance(i, fx.Node)]


@dataclass
class ClassPrinter:
    unit: Unit
    section: Section
    style: Style
    text: Text

    def member(self, weight: Parameter) -> str:
        return member_text(self.unit, weight, self.style)

    def relative(self, weight: Parameter) -> str:
        return ".".join(weight.path.split(".")[len(self.section.scope) :])

    def reference(self, node: fx.Node) -> str:
        weight: Parameter = node.meta["parameter"]
        if weight.buffer is not None:
            return f"self.{self.relative(weight)}"
        self.style.imports.add(("runtime.parameters", "local"))
        cast = self.style.cast_experts if weight.expert_ranks > 1 else self.style.cast
        return f"local(self.{self.relative(weight)}{', COMPUTE' if cast else ''})"

    def printer(self) -> Printer:
        return Printer(
            self.section,
            self.reference,
            self.style.comment,
            self.style.sent,
            self.style.imports,
            again=self.choices.names if self.choices else frozenset(),
        )

    @property
    def choices(self) -> Choices | None:
        """What the block computes again; None: nothing."""
        found = self.style.recompute.get(self.unit.name)
        return found if found is not None and any(found.of_each) else None

    @property
    def told(self) -> bool:
        """Whether each of the blocks is told what to compute again."""
        return not self.section.scope and self.choices is not None and self.choices.differ

    def _where(self) -> str:
        span = self.unit.span if not self.section.scope else self._first_span()
        return f", {place(span)}" if span else ""

    def _first_span(self) -> Span | None:
        nodes = _section_nodes(self.section)
        return next((n.meta["span"] for n in nodes if n.meta.get("span")), None)

    def _docstring(self) -> str:
        if not self.section.scope:
            return f'"""Block `{self.unit.name}`{self._where()}."""'
        return f'"""{".".join(self.section.scope)} of `{self.unit.name}`{self._where()}."""'

    def _needs_dropout(self) -> bool:
        return has_dropout(_section_nodes(self.section)) or any(
            has_dropout(c.nodes) for c in self.section.children()
        )

    def _members(self) -> Tree:
        """Everything `__init__` assigns: modules and parameters, by name, in the order of their
        first use: ZeRO 0 puts gradients into buckets from the end."""
        place = {node: i for i, node in enumerate(self.unit.graph.nodes)}
        found: list[tuple[int, str, str]] = []
        for child in self.section.children():
            path = ".".join(child.scope[len(self.section.scope) :])
            more = ", first_dropout" if has_dropout(child.nodes) else ""
            first = min(place[node] for node in child.nodes)
            found.append((first, path, f"{self.child_class(child)}(mesh{more})"))
        for node in self.section.parameters:
            weight: Parameter = node.meta["parameter"]
            first = min((place[user] for user in node.users), default=len(place))
            found.append((first, self.relative(weight), self.member(weight)))
        tree: Tree = {}
        for _, path, text in sorted(found, key=lambda one: one[0]):
            grow(tree, path, text)
        return tree

    def _weights(self) -> list[Parameter]:
        return [node.meta["parameter"] for node in self.section.parameters]

    def child_class(self, child: Child) -> str:
        return class_name("_".join((self.unit.name, *child.scope)))

    def print_class(self, name: str) -> None:
        statements = self.printer().statements()
        inputs = self.printer()
        inputs.statements()
        arguments = [inputs.names[n] for n in self.section.inputs]
        body = [s.text for s in statements]
        with self.text.block(f"class {name}(nn.Module):"):
            self.text.line(self._docstring())
            self.text.blank()
            self._print_init(used_axes(body))
            self.text.blank()
            self._print_forward(arguments, statements)
        self.text.blank(2)

    def _print_init(self, axes: tuple[str, ...]) -> None:
        more = ", first_dropout: int" if self._needs_dropout() else ""
        more += ", recompute: Collection[str]" if self.told else ""
        with self.text.block(f"def __init__(self, mesh: Mesh{more}):"):
            self.text.line("super().__init__()")
            notes = {self.relative(w): w.buffer.what for w in self._weights() if w.buffer}
            for key, value in self._members().items():
                if note := notes.get(key):
                    self.text.line(f"# {note}")
                text = value if isinstance(value, str) else group_text(value, self.style)
                self.text.line(f"self.{key} = {text}")
            for axis in axes:
                self.text.line(f"self.{axis} = mesh.{axis}")
            if has_dropout(_section_nodes(self.section)):
                self.text.line("self.first_dropout = first_dropout")
            if self.told:
                self.style.imports.add(("collections.abc", "Collection"))
                self.text.line("self.recompute = recompute")

    def _print_forward(self, arguments, statements) -> None:  # type: ignore[no-untyped-def]
        signature = ", ".join(f"{a}: Tensor" for a in arguments)
        name = "forward"
        if not self.section.scope and self.choices is not None:
            with self.text.block(f"def forward(self, {signature}) -> Tensor:"):
                self._print_recomputed(self.choices, arguments)
            self.text.blank()
            name = "run"
        with self.text.block(f"def {name}(self, {signature}) -> Tensor:"):
            print_statements(self.text, statements)

    def _print_recomputed(self, choices: Choices, arguments: list[str]) -> None:
        if choices.full:
            self.text.line("# keep the input alone, run the block again in the backward")
            call = ", ".join(["self.run", *arguments])
            self.style.imports.add(("torch.utils.checkpoint", "checkpoint"))
            self.text.line(
                f"return checkpoint({call}, use_reentrant=False, preserve_rng_state=False)"
            )
            return
        dropped = "self.recompute" if self.told else choices.constant
        self.style.imports.add(("runtime.recompute", "recomputed"))
        self.text.line(f"return recomputed({', '.join(['self.run', dropped, *arguments])})")


def print_statements(text: Text, statements) -> None:  # type: ignore[no-untyped-def]
    """The last statement is what is returned."""
    for statement in statements[:-1]:
        for comment in statement.comments:
            text.line(f"# {comment}")
        text.line(f"{statement.target} = {statement.text}")
    last = statements[-1]
    for comment in last.comments:
        text.line(f"# {comment}")
    text.line(f"return {last.text}")


def print_block(unit: Unit, style: Style, text: Text) -> None:
    """The classes of a repeated block, children first."""
    section = unit_section(unit)
    _print_children(unit, section, style, text)
    ClassPrinter(unit, section, style, text).print_class(class_name(unit.name))


def _print_children(unit: Unit, section: Section, style: Style, text: Text) -> None:
    printer = ClassPrinter(unit, section, style, text)
    for child in section.children():
        inner = child_section(child, unit)
        _print_children(unit, inner, style, text)
        ClassPrinter(unit, inner, style, text).print_class(printer.child_class(child))


# --------------------------------------------------------------------------------------------------
# Units that stand once: the first and the last


def leaf_groups(unit: Unit) -> dict[str, str]:
    """The modules that hold a plain unit's parameters: full path -> the name inside the unit's
    class.
    """
    paths = dict.fromkeys(p.path.rpartition(".")[0] for p in unit.parameters.values())
    names: dict[str, str] = {}
    for path in paths:
        short = path.rpartition(".")[2]
        names[path] = path.replace(".", "_") if short in names.values() else short
    return names


@dataclass
class PlainPrinter(ClassPrinter):
    """A unit whose parameters live in groups that the model owns and hands to it."""

    groups: dict[str, str] = field(default_factory=dict)

    def relative(self, weight: Parameter) -> str:
        group, _, name = weight.path.rpartition(".")
        return f"{self.groups[group]}.{name}"

    def _docstring(self) -> str:
        what = {"first": "What comes before the blocks", "last": "What comes after the blocks"}
        return f'"""{what.get(self.unit.name, f"Unit `{self.unit.name}`")}{self._where()}."""'

    def _print_init(self, axes: tuple[str, ...]) -> None:
        names = list(self.groups.values())
        dropped = self._needs_dropout()
        arguments = [f"{n}: Group" for n in names] + ["first_dropout: int"] * dropped
        mesh = ["mesh: Mesh"] if axes else []
        self.style.imports.add(("runtime.parameters", "Group"))
        with self.text.block(f"def __init__({', '.join(['self', *mesh, *arguments])}):"):
            self.text.line("super().__init__()")
            for name in names:
                self.text.line(f"self.{name} = {name}")
            for axis in axes:
                self.text.line(f"self.{axis} = mesh.{axis}")
            if dropped:
                self.text.line("self.first_dropout = first_dropout")


def print_plain(unit: Unit, style: Style, text: Text) -> str:
    """The class of a unit that stands once. Returns how the model makes one, `first_dropout`
    open.
    """
    groups = leaf_groups(unit)
    section = flat_section(unit)
    printer = PlainPrinter(unit, section, style, text, groups=groups)
    statements = printer.printer().statements()
    uses_mesh = bool(used_axes([s.text for s in statements]))
    printer.print_class(class_name(unit.name))
    arguments = ["mesh"] * uses_mesh + [f"self.{path}" for path in groups]
    if has_dropout(unit.calls()):
        arguments.append("first_dropout={first_dropout}")
    return f"{class_name(unit.name)}({', '.join(arguments)})"


def first_dropout(index: int) -> int:
    return DROPOUTS_PER_INSTANCE * index
