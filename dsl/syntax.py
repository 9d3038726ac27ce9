"""The frozen syntax tree: what was written, and where; nothing here knows what it means."""

from __future__ import annotations

from dataclasses import dataclass

from llmspec.dsl.program import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    text: str
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A quoted string; `value` has its escapes resolved."""

    value: str
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """`72 GiB per gpu`: digits with their multiplier, then unit and divisor if any."""

    digits: str
    unit: str | None = None
    per: str | None = None
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class At:
    """`80 GiB at 3.35 TB/s`."""

    size: Quantity
    rate: Quantity
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Tagged:
    """`nvlink 450 GB/s`."""

    tag: str
    quantity: Quantity
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """`[a, b]` or `(a, b)`."""

    items: tuple[Node, ...]
    round: bool
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """`{ bf16: 989 TFLOP/s }`."""

    entries: tuple[tuple[Name, Node], ...]
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    name: str | None
    value: Node
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    function: Name
    arguments: tuple[Argument, ...]
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Negative:
    value: Node
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """`first op rest op rest …`, operators of one precedence, read from the left."""

    first: Node
    rest: tuple[tuple[str, Node], ...]
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """`a -> b -> c`."""

    links: tuple[Node, ...]
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Then:
    """`warmup(2000) then cosine(to=3e-5)`."""

    parts: tuple[Node, ...]
    span: Span


Node = (
    Name
    | Text
    | Quantity
    | At
    | Tagged
    | Sequence
    | Record
    | Call
    | Negative
    | Operation
    | Chain
    | Then
)


# --------------------------------------------------------------------------------------------------
# Statements and declarations


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    name: Name
    default: Node | None
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """`key = value`, `key <= value`, `key in [..]`."""

    key: Name
    relation: str
    value: Node
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Let:
    name: Name
    value: Node
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A statement that is only an expression: a model's chain."""

    value: Node
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDeclaration:
    name: Name
    parameters: tuple[Parameter, ...]
    body: tuple[Statement, ...]
    span: Span


Statement = Setting | Let | Line | BlockDeclaration


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """`import llama` (a library file) or `import "parts/x.llmspec"`."""

    target: Name | Text
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDeclaration:
    """Either a body (with parameters, perhaps none) or a value: `model x = llama(…)`."""

    name: Name
    parameters: tuple[Parameter, ...]
    body: tuple[Statement, ...] | None
    value: Node | None
    span: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A cluster, train, budget, plan, gpu, cpu or kernels section: `cluster pod { … }`."""

    kind: str
    name: str | None
    body: tuple[Statement, ...]
    span: Span
    head: Span
    """Only the first line's words, for messages about the section as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefer:
    words: str
    span: Span


Declaration = Import | ModelDeclaration | Section | Prefer


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    path: str
    text: str
    declarations: tuple[Declaration, ...]
