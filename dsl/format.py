"""`llmspec fmt`: a text in, the same words in the house's layout out; comments stay where they are.

Line breaks are the writer's. Changed are indentation, spaces, runs of empty lines, and the columns
in which consecutive lines put their `=` and their comments. It works on tokens, so that meaning
cannot change.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from llmspec.dsl.diagnostics import Diagnostic
from llmspec.dsl.layout import CLOSER, CONTINUES, Layout, Token, lay_out

INDENT = 4
WIDTH = 100
ALIGNED = ("cluster", "train", "budget", "plan", "gpu", "cpu", "kernels")
TIGHT_AFTER = ("(", "[")
OPENS_VALUE = (
    "(",
    "[",
    "{",
    ",",
    ":",
    ";",
    "=",
    "<=",
    ">=",
    "->",
    "+",
    "-",
    "*",
    "/",
    "in",
    "then",
)
"""After these a `-` has nothing on its left."""
TIGHT_BEFORE = (")", "]", ",", ";", ":")


@dataclass(slots=True)
class Row:
    """One line: its code, the column of its aligned `=` if any, its comment."""

    code: str = ""
    comment: str = ""
    relation: int | None = None
    """Offset in `code` of the first relation at the top of an aligned section's line."""
    tokens: list[Token] = field(default_factory=list)


def format_text(text: str, path: str = "spec") -> str:
    """Errors: none; a text whose brackets or strings are open comes back as it is."""
    layout, faults = lay_out(path, text)
    if faults:
        return text
    rows = Rows(layout).rows()
    align_relations(rows)
    align_comments(rows)
    lines: list[str] = []
    for row in rows:
        line = (row.code + row.comment).rstrip()
        if line or (lines and lines[-1]):
            lines.append(line)
    while lines and not lines[-1]:
        lines.pop()
    return "\n".join(lines) + "\n" if lines else ""


def unformattable(path: str, text: str) -> list[Diagnostic]:
    """Why a text cannot be laid out: open brackets or strings."""
    return lay_out(path, text)[1]


class Rows:
    """Walks the lines, keeping the stack of open brackets."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.stack: list[tuple[Token, int, bool]] = []
        """Opener, the column that continuation lines take, whether its lines are aligned."""
        self.head: list[str] = []

    def rows(self) -> list[Row]:
        lines: list[list[Token]] = [[]]
        for token in self.layout.tokens:
            if token.kind == "newline":
                lines.append([])
            elif token.kind != "space":
                lines[-1].append(token)
        return [
            self.row(tokens, previous)
            for tokens, previous in zip(lines, continued(lines), strict=True)
        ]

    def row(self, tokens: list[Token], continues: bool) -> Row:
        row = Row(tokens=tokens)
        if not tokens:
            return row
        if tokens[-1].kind == "comment":
            row.comment = tokens[-1].text.rstrip()
            tokens = tokens[:-1]
            if not tokens:
                row.code = " " * self.indent(None, continues)
                return row
        text = " " * self.indent(tokens[0], continues)
        before: Token | None = None
        unary = False
        level = len(self.stack)
        aligned = bool(self.stack) and self.stack[-1][2]
        for token in tokens:
            if before is not None and spaced(before, token, unary, self.in_call()):
                text += " "
            if self.is_relation(token) and aligned and row.relation is None:
                row.relation = len(text) if len(self.stack) == level else None
                aligned = False
            text += token.text
            unary = token.text == "-" and (before is None or before.text in OPENS_VALUE)
            self.see(token, before, len(text))
            before = token
        if row.comment:
            text += "  "
        row.code = text
        if ";" in (t.text for t in tokens) or len(self.stack) != level:
            row.relation = None  # several settings, or one that goes on: nothing to line up
        return row

    def indent(self, first: Token | None, continues: bool) -> int:
        stack = self.stack
        if first is not None and stack and first.text in CLOSER.values():
            opener = stack[-1]
            if opener[0].start not in self.layout.value_braces and opener[0].text == "{":
                return INDENT * self.bodies(stack[:-1])
            return max(0, opener[1] - 1)
        if stack and not self.is_body(stack[-1][0]):
            return stack[-1][1]
        return INDENT * (self.bodies(stack) + (1 if continues else 0))

    def is_body(self, opener: Token) -> bool:
        return opener.text == "{" and opener.start not in self.layout.value_braces

    def bodies(self, stack: list[tuple[Token, int, bool]]) -> int:
        return sum(self.is_body(opener) for opener, _, _ in stack)

    def in_call(self) -> bool:
        return bool(self.stack) and self.stack[-1][0].text == "("

    def is_relation(self, token: Token) -> bool:
        return token.text in ("=", "<=", ">=")

    def see(self, token: Token, before: Token | None, column: int) -> None:
        if token.kind == "op" and token.text in CLOSER:
            aligned = self.is_body(token) and bool(self.head) and self.head[0] in ALIGNED
            self.stack.append((token, column + (token.text == "{"), aligned))
            self.head = []
        elif token.kind == "op" and token.text in CLOSER.values():
            self.stack.pop()
            self.head = []
        elif token.text == ";":
            self.head = []
        elif before is None and not self.stack:
            self.head = [token.text]


def continued(lines: list[list[Token]]) -> list[bool]:
    """For each line, whether it goes on with the statement of the line before."""
    result, trailing = [], False
    for tokens in lines:
        words = [t for t in tokens if t.kind != "comment"]
        result.append(bool(words) and (trailing or words[0].text in CONTINUES))
        if words:
            trailing = words[-1].text in CONTINUES
    return result


def spaced(before: Token, token: Token, after_unary: bool, in_call: bool) -> bool:
    if before.text in TIGHT_AFTER or token.text in TIGHT_BEFORE or after_unary:
        return False
    if in_call and "=" in (before.text, token.text):
        return False
    if token.text in ("(", "["):
        return before.kind != "word" or before.text == "in"
    return True


def align_relations(rows: list[Row]) -> None:
    for group in runs(rows, lambda row: row.relation is not None):
        wanted = max(row.relation or 0 for row in group)
        for row in group:
            at = row.relation or 0
            padded = row.code[:at] + " " * (wanted - at) + row.code[at:]
            if len(padded.rstrip()) <= WIDTH:
                row.code = padded


def align_comments(rows: list[Row]) -> None:
    """Comments of consecutive lines start in one column, when all of them fit."""
    for group in runs(rows, lambda row: bool(row.comment) and bool(row.code.strip())):
        wanted = max(len(row.code) for row in group)
        if all(wanted + len(row.comment) <= WIDTH for row in group):
            for row in group:
                row.code = row.code.ljust(wanted)


def runs(rows: list[Row], belongs) -> list[list[Row]]:  # type: ignore[no-untyped-def]
    found: list[list[Row]] = [[]]
    for row in rows:
        if belongs(row):
            found[-1].append(row)
        elif found[-1]:
            found.append([])
    return [group for group in found if group]
