"""Named choices (`adamw(…)`, `text(…)`, phases) in; `Call`s with every default out."""

from __future__ import annotations

from collections.abc import Iterable

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import did_you_mean, fault, listing, shown
from llmspec.dsl.options import CallRow, Kind, OptionRow
from llmspec.dsl.program import Call, Option, Span
from llmspec.dsl.values import Lookup, convert, evaluate, no_meaning, no_names


def read_call(
    node: syntax.Node, rows: Iterable[CallRow], what: str, lookup: Lookup = no_names
) -> Call:
    """`lookup`: the names that options may be given by.

    Errors: Fault for names and options that no row has, and for rows without meaning.
    """
    rows = tuple(rows)
    name, arguments = head_of(node, rows, what)
    row = next((r for r in rows if r.name == name), None)
    if row is None:
        known = [r.name for r in rows if r.meaning]
        raise fault(
            "E0504",
            f"`{what}` cannot be `{shown(name)}`",
            node.span,
            f"expected {listing(known)}",
            helps=did_you_mean(name, known),
        )
    if not row.meaning:
        raise no_meaning(f"`{what} = {name}`", node.span)
    free, given = split(row, arguments)
    if row.arguments_required and not free:
        raise fault("E0205", f"`{name}` needs {row.arguments}", node.span, "not given")
    return Call(
        name=name,
        arguments=tuple(free),
        options=tuple((o.name, resolve(o, given, row, node.span, lookup)) for o in row.options),
        span=node.span,
    )


def head_of(
    node: syntax.Node, rows: tuple[CallRow, ...], what: str
) -> tuple[str, tuple[syntax.Argument, ...]]:
    if isinstance(node, syntax.Name):
        return node.text, ()
    if isinstance(node, syntax.Call):
        return node.function.text, node.arguments
    known = [r.name for r in rows if r.meaning]
    raise fault("E0504", f"`{what}` is a choice by name", node.span, f"expected {listing(known)}")


def split(
    row: CallRow, arguments: tuple[syntax.Argument, ...]
) -> tuple[list[Option], dict[str, syntax.Argument]]:
    free: list[Option] = []
    given: dict[str, syntax.Argument] = {}
    positional = list(row.positional)
    for argument in arguments:
        name = argument.name or flag_named(row, argument)
        name = name or (positional.pop(0) if positional else None)
        if name is None and row.arguments is not None:
            value = evaluate(argument.value)
            if not isinstance(value, str):
                raise fault("E0206", f"`{row.name}` takes strings", argument.span, "this is none")
            free.append(value)
            continue
        option = row.row(name) if name is not None else None
        if name is None or option is None:
            raise unknown_option(row, name, argument.span)
        if name in given:
            raise fault("E0217", f"`{name}` is given twice", argument.span)
        given[name] = argument
    return free, given


def flag_named(row: CallRow, argument: syntax.Argument) -> str | None:
    if not isinstance(argument.value, syntax.Name):
        return None
    option = row.row(argument.value.text)
    return option.name if option is not None and option.kind == Kind.FLAG else None


def unknown_option(row: CallRow, name: str | None, span: Span) -> Exception:
    known = [o.name for o in row.options]
    label = f"it has {listing(known)}" if known else "it has no options"
    if name is None:
        return fault("E0202", f"`{row.name}` takes its options by name", span, label)
    return fault(
        "E0202",
        f"`{row.name}` has no option `{shown(name)}`",
        span,
        label,
        helps=did_you_mean(name, known),
    )


def resolve(
    option: OptionRow,
    given: dict[str, syntax.Argument],
    row: CallRow,
    span: Span,
    lookup: Lookup,
) -> Option:
    if option.name not in given:
        if option.required:
            raise fault("E0205", f"`{row.name}` needs `{option.name}`", span, "not given")
        default = option.default
        assert not callable(default), "choices have constant defaults"
        return default
    argument = given[option.name]
    value = True if flagged(option, argument) else evaluate(argument.value, lookup)
    return convert(option, value, argument.span, row.name)


def flagged(option: OptionRow, argument: syntax.Argument) -> bool:
    """Whether a bare word is the flag of that name: `mlp(ffn=64, bias)`."""
    return option.kind == Kind.FLAG and argument.name is None


def read_options(
    rows: tuple[OptionRow, ...], arguments: tuple[syntax.Argument, ...], owner: str, span: Span
) -> dict[str, syntax.Argument]:
    """The named arguments of an event, checked by name only."""
    _, given = split(CallRow(name=owner, options=rows), arguments)
    for row in rows:
        if row.required and row.name not in given:
            raise fault("E0205", f"`{owner}` needs `{row.name}`", span, "not given")
    return given
