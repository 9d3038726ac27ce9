"""Text in; out come tokens, and the same text with comments and insignificant line ends blanked.

The blanked text has the same length, so offsets in it are offsets in the file. A line end is
blanked inside ( ), [ ] and value braces, before a leading `->`, `+`, `*`, `/`, `then`, and after a
trailing one.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass

from llmspec.dsl.diagnostics import Diagnostic
from llmspec.dsl.program import Span

MAX_DEPTH = 48

TOKEN = re.compile(
    r"""(?P<comment>\#[^\n]*)
      | (?P<string>"(?:\\.|[^"\\\n])*")
      | (?P<open_string>"[^\n]*)
      | (?P<newline>\n)
      | (?P<space>[ \t\f\r]+)
      | (?P<word>(?:[KkMGTPE]?i?[bB]|[kMGTPE]?FLOP)/s(?![A-Za-z0-9_/])
               | [A-Za-z_][A-Za-z0-9_]*
               | \.?\d[\d_.]*(?:[eE][+-]?\d+)?\w*)
      | (?P<op>->|<=|>=|[-+*/=<>,:;(){}\[\]])
      | (?P<other>.)""",
    re.VERBOSE,
)
CONTINUES = frozenset(("->", "+", "*", "/", "then"))
CLOSER = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """tokens: all, spaces and comments too. value_braces: starts of `{` that open no body.

    pairs: start of each opening bracket -> start of its closing one.
    """

    path: str
    text: str
    tokens: tuple[Token, ...]
    blanked: str
    value_braces: frozenset[int]
    pairs: dict[int, int]
    line_starts: tuple[int, ...]

    def span(self, start: int, end: int) -> Span:
        line = bisect_right(self.line_starts, start)
        end_line = bisect_right(self.line_starts, max(start, end - 1))
        return Span(
            self.path,
            line,
            start - self.line_starts[line - 1] + 1,
            end_line,
            end - self.line_starts[end_line - 1] + 1,
        )


def scan(text: str) -> tuple[Token, ...]:
    return tuple(Token(m.lastgroup or "", m.group(), m.start()) for m in TOKEN.finditer(text))


def lay_out(path: str, text: str) -> tuple[Layout, list[Diagnostic]]:
    tokens = scan(text)
    starts = (0, *(t.end for t in tokens if t.kind == "newline"))
    brackets = Brackets()
    chars = list(text)
    before = ""
    after = following(tokens)
    for index, token in enumerate(tokens):
        if token.kind == "comment":
            chars[token.start : token.end] = " " * len(token.text)
        elif token.kind == "newline":
            if brackets.inside_value or before in CONTINUES or after[index] in CONTINUES:
                chars[token.start] = " "
        elif token.kind != "space":
            brackets.see(token, before)
            before = token.text
    layout = Layout(
        path=path,
        text=text,
        tokens=tokens,
        blanked="".join(chars),
        value_braces=frozenset(brackets.value_braces),
        pairs=brackets.pairs,
        line_starts=starts,
    )
    return layout, open_strings(layout) or brackets.faults(layout)


def following(tokens: tuple[Token, ...]) -> list[str]:
    """For each token, the text of the next one that is not blank."""
    after, seen = [""] * len(tokens), ""
    for index in range(len(tokens) - 1, -1, -1):
        after[index] = seen
        if tokens[index].kind not in ("space", "newline", "comment"):
            seen = tokens[index].text
    return after


class Brackets:
    """Follows the nesting: which braces open values, what never closes, what is too deep."""

    def __init__(self) -> None:
        self.stack: list[tuple[Token, bool]] = []
        self.value_braces: set[int] = set()
        self.pairs: dict[int, int] = {}
        self.mismatch: tuple[Token | None, Token] | None = None
        self.too_deep: Token | None = None

    @property
    def inside_value(self) -> bool:
        return bool(self.stack) and self.stack[-1][1]

    def see(self, token: Token, before: str) -> None:
        if token.kind != "op" or self.mismatch or self.too_deep:
            return
        if token.text in CLOSER:
            self.open(token, before)
        elif token.text in ")]}":
            opener = self.stack.pop()[0] if self.stack else None
            if opener is None or CLOSER[opener.text] != token.text:
                self.mismatch = (opener, token)
            else:
                self.pairs[opener.start] = token.start

    def open(self, token: Token, before: str) -> None:
        value = token.text != "{" or before in ("=", "(", "[", ",", ":")
        if token.text == "{" and value:
            self.value_braces.add(token.start)
        self.stack.append((token, value))
        if len(self.stack) > MAX_DEPTH:
            self.too_deep = token

    def faults(self, layout: Layout) -> list[Diagnostic]:
        if self.too_deep is not None:
            return [
                Diagnostic(
                    code="E0005",
                    message=f"brackets are nested more than {MAX_DEPTH} deep",
                    span=layout.span(self.too_deep.start, self.too_deep.end),
                    label="one too many",
                )
            ]
        if self.mismatch is not None:
            return [mismatch(layout, *self.mismatch)]
        return [
            Diagnostic(
                code="E0102",
                message=f"`{token.text}` is never closed",
                span=layout.span(token.start, token.end),
                label=f"no `{CLOSER[token.text]}` follows",
            )
            for token, _ in self.stack[-1:]
        ]


def mismatch(layout: Layout, opener: Token | None, token: Token) -> Diagnostic:
    span = layout.span(token.start, token.end)
    if opener is None:
        return Diagnostic(
            code="E0102",
            message=f"`{token.text}` closes nothing",
            span=span,
            label="nothing is open",
        )
    return Diagnostic(
        code="E0102",
        message=f"`{opener.text}` is closed by `{token.text}`",
        span=span,
        label=f"expected `{CLOSER[opener.text]}`",
        secondary=((layout.span(opener.start, opener.end), "opened here"),),
    )


def open_strings(layout: Layout) -> list[Diagnostic]:
    return [
        Diagnostic(
            code="E0103",
            message="a string is not closed on its line",
            span=layout.span(token.start, token.end),
            label='no `"` follows',
        )
        for token in layout.tokens
        if token.kind == "open_string"
    ][:10]
