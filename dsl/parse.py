"""Text in, syntax tree out, with every fault: a bad statement is left out, the rest is read."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from lark import Lark, Token, Transformer, UnexpectedCharacters, UnexpectedInput, v_args
from lark.tree import Meta

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import Diagnostic, did_you_mean, listing, shown
from llmspec.dsl.layout import Layout, lay_out
from llmspec.dsl.layout import Token as Piece

MAX_BYTES = 256 * 1024
MAX_FAULTS = 12

DECLARATIONS = (
    *("import", "model", "cluster", "train", "budget", "plan", "gpu", "cpu", "kernels", "prefer"),
)
VALUE = frozenset(("NUMBER", "LPAR", "LSQB", "LBRACE"))


@cache
def parser() -> Lark:
    grammar = Path(__file__).with_name("grammar.lark").read_text(encoding="utf-8")
    return Lark(
        grammar,
        parser="lalr",
        lexer="contextual",
        propagate_positions=True,
        maybe_placeholders=True,
    )


def parse(path: str, text: str) -> tuple[syntax.File, list[Diagnostic]]:
    """Errors come back as diagnostics; the tree then holds the statements that could be read."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        fault = Diagnostic(
            code="E0004",
            message=f"`{path}` is larger than {MAX_BYTES // 1024} KiB",
            notes=("a spec is a page of text; data belongs in the files that `dataset` names",),
        )
        return syntax.File(path=path, text="", declarations=()), [fault]
    layout, faults = lay_out(path, text)
    if faults:  # with brackets or strings open, every further message would be noise
        return syntax.File(path=path, text=text, declarations=()), faults
    source = layout.blanked
    while True:
        try:
            tree = parser().parse(source)
        except UnexpectedInput as error:
            faults.append(describe(error, layout, source))
            source, changed = without_statement(error, layout, source)
            if not changed or len(faults) >= MAX_FAULTS:
                return syntax.File(path=path, text=text, declarations=()), faults
            continue
        declarations = Builder(layout).transform(tree)
        return syntax.File(path=path, text=text, declarations=declarations), faults


# --------------------------------------------------------------------------------------------------
# Syntax faults


def offset(error: UnexpectedInput, source: str) -> int:
    token = getattr(error, "token", None)
    if token is not None and token.type == "$END":
        return len(source)
    position = error.pos_in_stream
    return len(source) if position is None or position < 0 else position


def describe(error: UnexpectedInput, layout: Layout, source: str) -> Diagnostic:
    start = offset(error, source)
    expected = set(getattr(error, "accepts", None) or getattr(error, "expected", None) or ())
    if isinstance(error, UnexpectedCharacters):
        expected = set(error.allowed or ())
    found = next((t for t in layout.tokens if t.start <= start < t.end), None)
    if found is None or found.kind in ("newline", "space", "comment") or source[start] == "\n":
        last = len(source[:start].rstrip())
        return Diagnostic(
            code="E0101",
            message="a statement ends too early",
            span=layout.span(max(0, last - 1), max(1, last)),
            label=expectation(expected),
        )
    text = found.text
    helps: tuple[str, ...] = ()
    if "CLUSTER" in expected:
        helps = did_you_mean(text, DECLARATIONS)
    elif looks_like_unit(found, source):
        helps = ("units are written like `72 GiB`, `400 Gb/s per gpu`, `4Mi tokens` or `30 days`",)
    return Diagnostic(
        code="E0101",
        message=f"`{shown(text)}` does not belong here",
        span=layout.span(found.start, found.end),
        label=expectation(expected),
        helps=helps,
    )


def looks_like_unit(found: Piece, source: str) -> bool:
    """A word after a number, that is neither a call nor an option."""
    number_before = source[: found.start].rstrip()[-1:].isdigit()
    after = source[found.end :].lstrip()[:1]
    return found.kind == "word" and number_before and after not in ("(", "=")


NAMES = {
    "NAME": "a name",
    "STRING": "a string",
    "EQ": "`=`",
    "EQUAL": "`=`",
    "RPAR": "`)`",
    "LPAR": "`(`",
    "RSQB": "`]`",
    "RBRACE": "`}`",
    "LBRACE": "`{`",
    "COLON": "`:`",
    "COMMA": "`,`",
    "_SEP": "the end of the line",
}
LEAST = ("COMMA", "RPAR", "RSQB", "RBRACE", "EQ", "EQUAL", "LBRACE", "NAME", "STRING", "COLON")


def expectation(expected: set[str]) -> str:
    if "CLUSTER" in expected:
        return "expected " + listing(DECLARATIONS).replace("`", "")
    if expected >= VALUE:
        return "expected a value"
    words = [NAMES[e] for e in LEAST if e in expected]
    if "_SEP" in expected:
        words.append(NAMES["_SEP"])
    if not words or len(words) > 4:
        return "not understood"
    return "expected " + " or ".join(words)


def without_statement(error: UnexpectedInput, layout: Layout, source: str) -> tuple[str, bool]:
    """Blank the statement that holds the fault (with its body, if it has one)."""
    start = offset(error, source)
    marks = boundaries(layout, source)
    at = start
    if at >= len(source) or source[at] in "\n;}":  # the fault is in what stands before
        at = max(0, len(source[:start].rstrip(" \t\r\f")) - 1)
    first = max((m + 1 for m in marks if m < at), default=0)
    last = min((m for m in marks if m >= max(at, first)), default=len(source))
    if last < len(source) and source[last] == "{":
        last = layout.pairs.get(last, len(source) - 1) + 1
    blank = "".join(c if c == "\n" else " " for c in source[first:last])
    changed = source[:first] + blank + source[last:]
    return changed, changed != source


def boundaries(layout: Layout, source: str) -> list[int]:
    """Where statements start or end: `;`, significant line ends, braces of bodies."""
    closers = {layout.pairs[b] for b in layout.value_braces if b in layout.pairs}
    marks = []
    for token in layout.tokens:
        if source[token.start] != token.text[0]:
            continue
        body_brace = token.text == "{" and token.start not in layout.value_braces
        body_end = token.text == "}" and token.start not in closers
        if token.kind == "newline" or token.text == ";" or body_brace or body_end:
            marks.append(token.start)
    return marks


# --------------------------------------------------------------------------------------------------
# The tree


def unquote(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1])


@v_args(meta=True)
class Builder(Transformer[Token, tuple[syntax.Declaration, ...]]):
    """Lark's tree to ours; one method per rule of the grammar."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def span(self, meta: Meta) -> Any:
        return self.layout.span(meta.start_pos, meta.end_pos)

    def of(self, token: Token) -> syntax.Name:
        return syntax.Name(
            text=str(token), span=self.layout.span(token.start_pos or 0, token.end_pos or 0)
        )

    def start(self, meta: Meta, items: list[Any]) -> tuple[syntax.Declaration, ...]:
        return tuple(items)

    def import_(self, meta: Meta, items: list[Any]) -> syntax.Import:
        name = self.of(items[0])
        target: syntax.Name | syntax.Text = name
        if items[0].type == "STRING":
            target = syntax.Text(value=unquote(name.text), span=name.span)
        return syntax.Import(target=target, span=self.span(meta))

    def template(self, meta: Meta, items: list[Any]) -> syntax.ModelDeclaration:
        return syntax.ModelDeclaration(
            name=self.of(items[0]),
            parameters=items[1] if len(items) == 3 else (),
            body=items[-1],
            value=None,
            span=self.span(meta),
        )

    def model_value(self, meta: Meta, items: list[Any]) -> syntax.ModelDeclaration:
        return syntax.ModelDeclaration(
            name=self.of(items[0]), parameters=(), body=None, value=items[1], span=self.span(meta)
        )

    def section(self, meta: Meta, items: list[Any]) -> syntax.Section:
        kind, *name, body = items
        token = name[0] if name and name[0] is not None else None
        text = None if token is None else str(token)
        last = token if token is not None else kind
        quoted = token is not None and token.type == "STRING"
        return syntax.Section(
            kind=str(kind),
            name=unquote(text) if text is not None and quoted else text,
            body=body,
            span=self.span(meta),
            head=self.layout.span(kind.start_pos, last.end_pos),
        )

    def prefer(self, meta: Meta, items: list[Any]) -> syntax.Prefer:
        return syntax.Prefer(words=" ".join(map(str, items)), span=self.span(meta))

    def body(self, meta: Meta, items: list[Any]) -> tuple[syntax.Statement, ...]:
        return tuple(items)

    def setting(self, meta: Meta, items: list[Any]) -> syntax.Setting:
        key, relation, value = items
        return syntax.Setting(
            key=self.of(key), relation=str(relation), value=value, span=self.span(meta)
        )

    def let(self, meta: Meta, items: list[Any]) -> syntax.Let:
        return syntax.Let(name=self.of(items[0]), value=items[1], span=self.span(meta))

    def line(self, meta: Meta, items: list[Any]) -> syntax.Line:
        return syntax.Line(value=items[0], span=items[0].span)

    def block(self, meta: Meta, items: list[Any]) -> syntax.BlockDeclaration:
        name, parameters, body = items
        return syntax.BlockDeclaration(
            name=self.of(name), parameters=parameters, body=body, span=self.span(meta)
        )

    def parameters(self, meta: Meta, items: list[Any]) -> tuple[syntax.Parameter, ...]:
        return tuple(items)

    def parameter(self, meta: Meta, items: list[Any]) -> syntax.Parameter:
        return syntax.Parameter(name=self.of(items[0]), default=items[1], span=self.span(meta))

    def then(self, meta: Meta, items: list[Any]) -> syntax.Then:
        return syntax.Then(parts=tuple(items), span=self.span(meta))

    def chain_(self, meta: Meta, items: list[Any]) -> syntax.Chain:
        return syntax.Chain(links=tuple(items), span=self.span(meta))

    def operation(self, meta: Meta, items: list[Any]) -> syntax.Operation:
        rest = tuple((str(items[i]), items[i + 1]) for i in range(1, len(items), 2))
        return syntax.Operation(first=items[0], rest=rest, span=self.span(meta))

    def negative(self, meta: Meta, items: list[Any]) -> syntax.Negative:
        return syntax.Negative(value=items[1], span=self.span(meta))

    def quantity(self, meta: Meta, items: list[Any]) -> syntax.Quantity:
        by_type = {token.type: str(token) for token in items}
        per = " ".join(str(token) for token in items if token.type == "NAME")
        return syntax.Quantity(
            digits=by_type["NUMBER"],
            unit=by_type.get("UNIT"),
            per=per or None,
            span=self.span(meta),
        )

    def at(self, meta: Meta, items: list[Any]) -> syntax.At:
        return syntax.At(size=items[0], rate=items[1], span=self.span(meta))

    def name(self, meta: Meta, items: list[Any]) -> syntax.Name:
        return self.of(items[0])

    def tagged(self, meta: Meta, items: list[Any]) -> syntax.Tagged:
        return syntax.Tagged(tag=str(items[0]), quantity=items[1], span=self.span(meta))

    def call(self, meta: Meta, items: list[Any]) -> syntax.Call:
        return syntax.Call(
            function=self.of(items[0]), arguments=tuple(items[1:]), span=self.span(meta)
        )

    def argument(self, meta: Meta, items: list[Any]) -> syntax.Argument:
        return syntax.Argument(name=None, value=items[0], span=self.span(meta))

    def named(self, meta: Meta, items: list[Any]) -> syntax.Argument:
        return syntax.Argument(name=str(items[0]), value=items[1], span=self.span(meta))

    def text(self, meta: Meta, items: list[Any]) -> syntax.Text:
        return syntax.Text(value=unquote(str(items[0])), span=self.span(meta))

    def round(self, meta: Meta, items: list[Any]) -> syntax.Sequence:
        return syntax.Sequence(items=tuple(items), round=True, span=self.span(meta))

    def square(self, meta: Meta, items: list[Any]) -> syntax.Sequence:
        return syntax.Sequence(items=tuple(items), round=False, span=self.span(meta))

    def record(self, meta: Meta, items: list[Any]) -> syntax.Record:
        return syntax.Record(entries=tuple(items), span=self.span(meta))

    def entry(self, meta: Meta, items: list[Any]) -> tuple[syntax.Name, syntax.Node]:
        return self.of(items[0]), items[1]
