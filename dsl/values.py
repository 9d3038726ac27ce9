"""Constant expressions: a node and the names in scope in; a number, word, string or list out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import did_you_mean, fault, listing, shown
from llmspec.dsl.options import Kind, OptionRow
from llmspec.dsl.program import Option, Span
from llmspec.dsl.units import EXAMPLES, Dimension, Measure, measure, parse_number


@dataclass(frozen=True, slots=True)
class Word:
    """A bare name that stands for itself (`gelu`, `auto`)."""

    text: str


Value = int | float | bool | None | str | Word | Measure | tuple["Value", ...]
Lookup = Callable[[str], Value]
"""A name's value; KeyError when it has none."""


@dataclass(frozen=True, slots=True)
class Names:
    """A lookup that can also say which names it knows, for the help of a message."""

    find: Lookup
    known: Callable[[], Iterable[str]]

    def __call__(self, name: str) -> Value:
        return self.find(name)


CONSTANTS: Mapping[str, bool | None] = {"true": True, "false": False, "none": None}


def no_names(name: str) -> Value:
    raise KeyError(name)


def number_of(node: syntax.Quantity) -> int | float | Measure:
    try:
        number = parse_number(node.digits)
        if node.unit is not None:
            return measure(number, node.unit, node.per)
    except OverflowError:
        raise fault("E0303", "this number is too large to mean anything", node.span) from None
    return number if node.per is None else Measure(number, Dimension.NUMBER, node.per)


def evaluate(node: syntax.Node, lookup: Lookup = no_names) -> Value:
    """Errors: Fault for what is no constant, and for arithmetic that cannot be done."""
    match node:
        case syntax.Quantity():
            return number_of(node)
        case syntax.Text():
            return node.value
        case syntax.Name():
            return value_of_name(node.text, lookup)
        case syntax.Sequence():
            return tuple(evaluate(item, lookup) for item in node.items)
        case syntax.Negative():
            return arithmetic("-", 0, evaluate(node.value, lookup), node.span)
        case syntax.Operation():
            total = operand(node.first, lookup)
            for op, right in node.rest:
                total = arithmetic(op, total, operand(right, lookup), node.span)
            return total
        case _:
            raise fault("E0206", "a plain value is expected here", node.span, describe(node))


def operand(node: syntax.Node, lookup: Lookup) -> Value:
    """A side of an operation: there a word cannot stand for itself."""
    value = evaluate(node, lookup)
    if isinstance(value, Word):
        known = lookup.known() if isinstance(lookup, Names) else ()
        raise fault(
            "E0201",
            f"`{shown(value.text)}` is not known here",
            node.span,
            helps=did_you_mean(value.text, known),
        )
    return value


def value_of_name(name: str, lookup: Lookup) -> Value:
    if name in CONSTANTS:
        return CONSTANTS[name]
    try:
        return lookup(name)
    except KeyError:
        return Word(name)


def describe(node: syntax.Node) -> str:
    match node:
        case syntax.Call():
            return f"this is a call of `{shown(node.function.text)}`"
        case syntax.Chain():
            return "this is a chain"
        case syntax.Record():
            return "this is a list of named values"
        case syntax.Then():
            return "this is a sequence of phases"
        case syntax.At() | syntax.Tagged():
            return "this is more than one value"
        case _:
            return "this is not one"


def plain(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def arithmetic(op: str, left: Value, right: Value, span: Span) -> Value:
    if isinstance(left, Measure) or isinstance(right, Measure):
        return measured_arithmetic(op, left, right, span)
    for side in (left, right):
        if not plain(side):
            raise fault("E0206", "arithmetic needs numbers", span, f"{show(side)} is none")
    return calculate(op, left, right, span)  # type: ignore[arg-type]


def calculate(op: str, a: int | float, b: int | float, span: Span) -> int | float:
    try:
        match op:
            case "+":
                result: int | float = a + b
            case "-":
                result = a - b
            case "*":
                result = a * b
            case _:
                whole = isinstance(a, int) and isinstance(b, int) and b != 0 and a % b == 0
                result = a // b if whole else a / b
    except ZeroDivisionError:
        raise fault("E0303", "a division by zero", span) from None
    except OverflowError:
        result = float("inf")
    if not abs(result) < 1e30:
        raise fault("E0303", "this number is too large to mean anything", span)
    return result


def measured_arithmetic(op: str, left: Value, right: Value, span: Span) -> Measure:
    a = left if isinstance(left, Measure) else None
    b = right if isinstance(right, Measure) else None
    if a and b and op in "+-":
        if (a.dimension, a.per) != (b.dimension, b.per):
            raise fault(
                "E0301",
                "units are mixed",
                span,
                f"{show(a)} and {show(b)} cannot be added",
            )
        return Measure(calculate(op, a.value, b.value, span), a.dimension, a.per)
    if a and plain(right) and op in "*/":
        return Measure(calculate(op, a.value, right, span), a.dimension, a.per)  # type: ignore[arg-type]
    if b and plain(left) and op == "*":
        return Measure(calculate(op, left, b.value, span), b.dimension, b.per)  # type: ignore[arg-type]
    raise fault("E0301", "units are mixed", span, f"{show(left)} {op} {show(right)}")


def show(value: Value) -> str:
    """A value in a message."""
    match value:
        case None:
            return "`none`"
        case bool():
            return "`true`" if value else "`false`"
        case Word():
            return f"`{shown(value.text)}`"
        case str():
            return "a string"
        case Measure():
            return (
                f"a number of {value.dimension}" if value.dimension in COUNTED else value.dimension
            )
        case tuple():
            return "a list"
        case _:
            return f"{value:,}".replace(",", "_") if isinstance(value, int) else f"{value:g}"


COUNTED = (Dimension.BYTES, Dimension.TOKENS, Dimension.SEQUENCES)


# --------------------------------------------------------------------------------------------------
# What an option takes


def convert(row: OptionRow, value: Value, span: Span, owner: str) -> Option:
    """The value as the row's kind. `owner`: what the option belongs to, for messages."""
    what = f"`{row.name}` of `{owner}`"
    result = checked(row, value, span, what)
    if row.now and result not in row.now:
        raise no_meaning(f"{what} as {show(value)}", span)
    return result


def checked(row: OptionRow, value: Value, span: Span, what: str) -> Option:
    if value is None and row.none:
        return None
    match row.kind:
        case Kind.COUNT | Kind.NATURAL:
            return whole(value, span, what, least=1 if row.kind == Kind.COUNT else 0)
        case Kind.NUMBER | Kind.POSITIVE | Kind.PROBABILITY:
            return real(row.kind, value, span, what)
        case Kind.FLAG:
            if isinstance(value, bool):
                return value
        case Kind.WORD:
            return word(row, value, span, what)
        case Kind.TEXT:
            if isinstance(value, str):
                return value
        case Kind.TEXTS:
            texts = value if isinstance(value, tuple) else (value,)
            if all(isinstance(text, str) for text in texts):
                return texts  # type: ignore[return-value]
        case Kind.WORD_OR_TEXT:
            if isinstance(value, str):
                return value
            return word(row, value, span, what)
        case Kind.WORD_OR_NUMBER:
            if isinstance(value, Word):
                return word(row, value, span, what)
            return real(Kind.POSITIVE, value, span, what)
        case Kind.TIE:
            if isinstance(value, bool | str):
                return value
        case Kind.PAIR:
            if isinstance(value, tuple) and len(value) == 2:
                a, b = (real(Kind.PROBABILITY, v, span, what) for v in value)
                return (a, b)
    raise wrong(what, row.kind, value, span)


def wrong(what: str, kind: str, value: Value, span: Span) -> Exception:
    if isinstance(value, Word) and kind != Kind.FLAG:
        return fault(
            "E0201",
            f"`{shown(value.text)}` is not known here",
            span,
            f"{what} must be {kind}",
        )
    if isinstance(value, Measure):
        return fault("E0302", f"{what} has the wrong unit", span, f"{what} must be {kind}")
    return fault("E0206", f"{what} has the wrong kind of value", span, f"must be {kind}")


def whole(value: Value, span: Span, what: str, *, least: int) -> int:
    kind = Kind.COUNT if least == 1 else Kind.NATURAL
    if not plain(value):
        raise wrong(what, kind, value, span)
    assert isinstance(value, int | float), "plain"
    if value != int(value):
        raise fault("E0303", f"{what} is not a whole number", span, f"this is {value:g}")
    if value < least:
        raise fault("E0303", f"{what} is too small", span, f"must be {kind}")
    if value > 2**53:
        raise fault("E0303", f"{what} is too large", span, "more than 2^53")
    return int(value)


def real(kind: Kind, value: Value, span: Span, what: str) -> float:
    if not plain(value):
        raise wrong(what, kind, value, span)
    assert isinstance(value, int | float), "plain"
    number = float(value)
    too_low = number <= 0 if kind == Kind.POSITIVE else number < 0
    if too_low or (kind == Kind.PROBABILITY and number >= 1):
        raise fault("E0303", f"{what} is out of range", span, f"must be {kind}")
    return number


def word(row: OptionRow, value: Value, span: Span, what: str) -> str:
    if isinstance(value, Word) and value.text in row.words:
        return value.text
    known = (*row.words, "none") if row.none else row.words
    if not isinstance(value, Word):
        raise fault(
            "E0206", f"{what} has the wrong kind of value", span, f"expected {listing(known)}"
        )
    raise fault(
        "E0504",
        f"{what} cannot be `{shown(value.text)}`",
        span,
        f"expected {listing(known)}",
        helps=did_you_mean(value.text, known),
    )


def in_units(value: Value, dimension: Dimension, span: Span, what: str) -> Measure:
    """A measure of the dimension asked for. Errors: Fault that shows the unit it needs."""
    if isinstance(value, Measure) and value.dimension == dimension:
        if not value.value > 0:
            raise fault("E0303", f"{what} must be more than 0", span)
        return value
    if plain(value):
        raise fault(
            "E0302",
            f"{what} needs a unit",
            span,
            f"this is {Dimension.NUMBER}",
            helps=(f"units are written like `{EXAMPLES[dimension]}`",),
        )
    raise fault(
        "E0302",
        f"{what} has the wrong unit",
        span,
        f"this is {show(value)}, not {dimension}",
        helps=(f"it is written like `{EXAMPLES[dimension]}`",),
    )


def no_meaning(what: str, span: Span | None) -> Exception:
    return fault("E0601", f"{what} has no meaning yet", span, "understood, but not built yet")
