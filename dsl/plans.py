"""A `plan` section in, its constraints out: what each line says by itself."""

from __future__ import annotations

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import Fault, SpecError, did_you_mean, fault, listing
from llmspec.dsl.hardware import unknown_key
from llmspec.dsl.legality import check_pins
from llmspec.dsl.options import PLAN, PlanRow
from llmspec.dsl.parse import parse
from llmspec.dsl.pins import Pins
from llmspec.dsl.program import Constraint, Option, Relation, Span
from llmspec.dsl.values import Value, Word, evaluate, show, whole


def constraints_of(section: syntax.Section) -> tuple[list[Constraint], list[Fault]]:
    """What the lines say, each by itself. `auto` says nothing of a key that is open."""
    found: list[Constraint] = []
    faults: list[Fault] = []
    for statement in section.body:
        try:
            made = constraint_of(statement)
        except Fault as error:
            faults.append(error)
            continue
        if made is not None:
            found.append(made)
    return found, faults


def constraint_of(statement: syntax.Statement) -> Constraint | None:
    if not isinstance(statement, syntax.Setting):
        raise fault("E0501", "a plan is a list of `key = value` lines", statement.span)
    row = PLAN.get(statement.key.text)
    if row is None:
        raise unknown_key("plan", statement.key.text, PLAN, statement.key.span)
    if isinstance(statement.value, syntax.Name) and statement.value.text == "auto":
        if not row.closed:
            return None
        return Constraint(key=row.name, relation=Relation.IN, values=row.words, span=statement.span)
    relation = Relation(statement.relation)
    if relation in (Relation.LE, Relation.GE) and row.least is None:
        raise fault("E0402", f"`{row.name}` has no order", statement.span, "use `=` or `in [..]`")
    return Constraint(
        key=row.name,
        relation=relation,
        values=values_of(row, relation, statement),
        span=statement.span,
    )


def values_of(row: PlanRow, relation: Relation, statement: syntax.Setting) -> tuple[Option, ...]:
    node = statement.value
    if relation == Relation.IN:
        if not isinstance(node, syntax.Sequence) or not node.items:
            raise fault("E0402", "`in` needs a list", node.span, "like `[1, 2, 4]`")
        return tuple(one_value(row, relation, item) for item in node.items)
    return (one_value(row, relation, node),)


def one_value(row: PlanRow, relation: Relation, node: syntax.Node) -> Option:
    value = plan_word(node) if row.words else evaluate(node)
    if row.name == "stages":
        result: Option = stages_of(value, node)
    elif row.name == "offload" and isinstance(node, syntax.Sequence):
        result = offload_of(row, node)
    elif row.name == "recompute" and isinstance(value, tuple):
        result = listed_operators(value, node)
    elif row.words:
        alone = relation == Relation.EQ  # only then a word may be `auto`
        result = word_of(row, value, node, *(("auto",) if alone else ()))
    else:
        result = whole(value, node.span, f"`{row.name}`", least=row.least or 0)
        if row.most is not None and result > row.most:
            raise fault("E0402", f"`{row.name}` goes from {row.least} to {row.most}", node.span)
    return result


def plan_word(node: syntax.Node) -> Value:
    """`none` and `1f1b` are words here."""
    if isinstance(node, syntax.Name):
        return Word(node.text)
    if isinstance(node, syntax.Text):
        return Word(node.value)
    if isinstance(node, syntax.Sequence):
        return tuple(item.text if isinstance(item, syntax.Name) else "" for item in node.items)
    return evaluate(node)


def word_of(row: PlanRow, value: Value, node: syntax.Node, *more: str) -> str:
    """`more`: words that have been looked for before."""
    if isinstance(value, Word) and value.text in row.words:
        return value.text
    name = value.text if isinstance(value, Word) else ""
    words = (*row.words, *more)
    raise fault(
        "E0402",
        f"`{row.name}` cannot be {show(value)}",
        node.span,
        f"expected {listing(words)}",
        helps=did_you_mean(name, words),
    )


def offload_of(row: PlanRow, node: syntax.Sequence) -> Option:
    """A list of what lives in host memory, sorted; parameters take the optimizer along."""
    words = {word_of(row, plan_word(item), item) for item in node.items}
    if not words or ("none" in words and len(words) > 1):
        raise fault(
            "E0402", "`offload` is `none`, or what lives in host memory", node.span, "not both"
        )
    if "parameters" in words:
        words -= {"optimizer"}
    return words.pop() if len(words) == 1 else tuple(sorted(words))


def listed_operators(value: tuple[Value, ...], node: syntax.Node) -> tuple[str, ...]:
    """Whether the model has them is checked where its graph is known."""
    names = tuple(v for v in value if isinstance(v, str) and v)
    if not names or len(names) < len(value):
        label = "like `[attention, swiglu]`"
        raise fault("E0402", "`recompute` lists names of operators", node.span, label)
    return names


def operator_kind(name: str) -> str:
    """What an operator is, by its own name: the second `rmsnorm` of a block is `rmsnorm_2`."""
    kind, _, number = name.rpartition("_")
    return kind if kind and number.isdigit() else name


def stages_of(value: Value, node: syntax.Node) -> tuple[int, ...]:
    if isinstance(value, tuple) and value:
        return tuple(whole(v, node.span, "a stage", least=0) for v in value)
    raise fault(
        "E0402", "`stages` is a list of numbers of blocks", node.span, "like `[8, 8, 8, 8]`"
    )


BLOCK = "plan"
"""The path of a block that is in no file."""


def parse_block(text: str) -> tuple[Constraint, ...]:
    """Errors: SpecError."""
    found = checked(section_of(text), text)
    faults = check_pins(Pins(constraints=found, model=None, cluster=None, train=None))
    if faults:
        raise SpecError([f.diagnostic for f in faults], {BLOCK: text})
    return found


def section_of(text: str) -> syntax.Section:
    """Of one `plan { … }` block. Errors: SpecError."""
    file, diagnostics = parse(BLOCK, text)
    sections = [d for d in file.declarations if isinstance(d, syntax.Section) and d.kind == "plan"]
    if not diagnostics and (len(sections) != 1 or len(file.declarations) != 1):
        span = Span(BLOCK, 1, 1, 1, 2)
        diagnostics = [fault("E0501", "this is not one `plan { … }` block", span).diagnostic]
    if diagnostics:
        raise SpecError(diagnostics, {BLOCK: text})
    return sections[0]


def checked(section: syntax.Section, text: str) -> tuple[Constraint, ...]:
    """What the lines say, each by itself. Errors: SpecError."""
    found, faults = constraints_of(section)
    if faults:
        raise SpecError([f.diagnostic for f in faults], {BLOCK: text})
    return tuple(found)
