"""A diagnostic is a frozen value; render.py says how it looks, codes.py what its code means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from llmspec.dsl.program import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """One fault of the user's files.

    message: a fact that stands alone. label: the particulars, under the caret. notes add
    facts; only helps suggest, in text that could be applied.
    """

    code: str
    message: str
    span: Span | None = None
    label: str = ""
    secondary: tuple[tuple[Span, str], ...] = ()
    notes: tuple[str, ...] = ()
    helps: tuple[str, ...] = ()


class SpecError(Exception):
    """All the faults found in a spec. `sources`: text by path, for the renderers."""

    def __init__(self, diagnostics: Iterable[Diagnostic], sources: Mapping[str, str]) -> None:
        self.diagnostics = tuple(diagnostics)
        self.sources = dict(sources)
        super().__init__("; ".join(f"{d.code}: {d.message}" for d in self.diagnostics))


class Fault(Exception):
    """Leaves the statement at hand; whoever loops over statements collects its diagnostic."""

    def __init__(self, diagnostic: Diagnostic) -> None:
        self.diagnostic = diagnostic
        super().__init__(diagnostic.message)


def fault(
    code: str,
    message: str,
    span: Span | None,
    label: str = "",
    *,
    secondary: Iterable[tuple[Span, str]] = (),
    notes: Iterable[str] = (),
    helps: Iterable[str] = (),
) -> Fault:
    return Fault(
        Diagnostic(
            code=code,
            message=message,
            span=span,
            label=label,
            secondary=tuple(secondary),
            notes=tuple(notes),
            helps=tuple(helps),
        )
    )


def nearest(name: str, known: Iterable[str]) -> tuple[str, ...]:
    """At most three names that the writer may have meant."""
    if len(name) > 60:  # difflib is quadratic, and nobody mistypes a word that long
        return ()
    by_case = {k.lower(): k for k in sorted(set(known))}
    found = get_close_matches(name.lower(), by_case, n=3, cutoff=0.6)
    return tuple(by_case[f] for f in found)


def did_you_mean(name: str, known: Iterable[str], *, otherwise: str = "") -> tuple[str, ...]:
    """The help that names near names; `otherwise` when nothing is near."""
    near = nearest(name, known)
    if near:
        return ("did you mean " + " or ".join(f"`{n}`" for n in near) + "?",)
    return (otherwise,) if otherwise else ()


def shown(name: str) -> str:
    """A user's word inside a message, cut when absurdly long."""
    return name if len(name) <= 60 else name[:57] + "…"


def listing(words: Iterable[str], last: str = "or") -> str:
    """`a`, `b` or `c`."""
    quoted = [f"`{w}`" for w in words]
    if len(quoted) < 2:
        return "".join(quoted)
    return ", ".join(quoted[:-1]) + f" {last} " + quoted[-1]
