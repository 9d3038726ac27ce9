"""Diagnostics for people, for tools that want one line, and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from llmspec.dsl.diagnostics import Diagnostic
from llmspec.dsl.program import Span

MAX_COLUMNS = 160
PACKAGE = Path(__file__).resolve().parents[1]


def render_human(diagnostics: Iterable[Diagnostic], sources: Mapping[str, str]) -> str:
    """`sources`: text by path; a diagnostic whose file is not there is shown without its lines."""
    return "\n\n".join(render_one(d, sources) for d in diagnostics) + "\n"


def render_one(diagnostic: Diagnostic, sources: Mapping[str, str]) -> str:
    out = [f"error[{diagnostic.code}]: {diagnostic.message}"]
    if diagnostic.span is not None:
        out += snippet(diagnostic.span, diagnostic.label, diagnostic.secondary, sources)
    out += [f"   = note: {note}" for note in diagnostic.notes]
    out += [f"   = help: {help_}" for help_ in diagnostic.helps]
    return "\n".join(out)


def snippet(
    span: Span, label: str, secondary: Iterable[tuple[Span, str]], sources: Mapping[str, str]
) -> list[str]:
    """The marked lines, the fault's own file first; lines in file order."""
    marks = [(span, "^", label)] + [(s, "-", text) for s, text in secondary]
    paths = list(dict.fromkeys(s.path for s, _, _ in marks))
    width = max(2, *(len(str(s.line)) for s, _, _ in marks))
    out: list[str] = []
    for path in paths:
        here = sorted((m for m in marks if m[0].path == path), key=lambda m: position(m[0]))
        first = span if path == span.path else here[0][0]
        arrow = "-->" if path == span.path else ":::"
        out.append(f"{' ' * width}{arrow} {path}:{first.line}:{first.column}")
        text = source_of(path, sources)
        if text is not None:
            out += marked_lines(here, text.split("\n"), width)
    return out


def source_of(path: str, sources: Mapping[str, str]) -> str | None:
    """The library's files are always at hand."""
    if path in sources:
        return sources[path]
    file = PACKAGE / path
    return file.read_text(encoding="utf-8") if path.startswith("library/") else None


def marked_lines(marks: list[tuple[Span, str, str]], lines: list[str], width: int) -> list[str]:
    gutter = " " * (width + 1) + "|"
    out = [gutter]
    last = 0
    for span, mark, label in marks:
        line = lines[span.line - 1] if span.line <= len(lines) else ""
        start, line = window(line.rstrip("\r").replace("\t", " "), span.column - 1)
        if span.line != last:
            if last and span.line > last + 1:
                out.append("...")
            out.append(f"{span.line:>{width}} | {line}".rstrip())
            last = span.line
        end = span.end_column if span.end_line == span.line else len(line) + start + 1
        carets = mark * max(1, min(end - span.column, len(line) - (span.column - 1 - start)))
        out.append(f"{gutter} {' ' * (span.column - 1 - start)}{carets} {label}".rstrip())
    out.append(gutter)
    return out


def window(line: str, column: int) -> tuple[int, str]:
    """The part of an overlong line that shows `column` (from 0), and where that part starts."""
    if len(line) <= MAX_COLUMNS:
        return 0, line
    start = max(0, column - MAX_COLUMNS // 2)
    return start, line[start : start + MAX_COLUMNS]


def position(span: Span) -> tuple[int, int]:
    return span.line, span.column


def render_line(diagnostic: Diagnostic) -> str:
    where = ""
    if diagnostic.span is not None:
        where = f"{diagnostic.span.path}:{diagnostic.span.line}:{diagnostic.span.column}: "
    tail = f" ({diagnostic.label})" if diagnostic.label else ""
    return f"{where}error[{diagnostic.code}]: {diagnostic.message}{tail}"


def as_json(diagnostic: Diagnostic) -> dict[str, object]:
    """Schema 1: what `--json` prints for each diagnostic."""
    return {
        "code": diagnostic.code,
        "message": diagnostic.message,
        "span": span_json(diagnostic.span),
        "label": diagnostic.label,
        "secondary": [{"span": span_json(s), "label": t} for s, t in diagnostic.secondary],
        "notes": list(diagnostic.notes),
        "helps": list(diagnostic.helps),
    }


def span_json(span: Span | None) -> dict[str, object] | None:
    if span is None:
        return None
    return {
        "path": span.path,
        "line": span.line,
        "column": span.column,
        "end_line": span.end_line,
        "end_column": span.end_column,
    }


def render_json(diagnostics: Iterable[Diagnostic]) -> str:
    return json.dumps({"schema": 1, "diagnostics": [as_json(d) for d in diagnostics]}, indent=2)
