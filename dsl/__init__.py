"""The language: `load` a spec into a `Program`, `check` it, print it back with every default."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from llmspec.dsl.diagnostics import Diagnostic, SpecError
from llmspec.dsl.program import Constraint, Program

if TYPE_CHECKING:
    from llmspec.dsl.program import Cluster

__all__ = [
    "Diagnostic",
    "SpecError",
    "check",
    "cluster_from_words",
    "explain",
    "explicit",
    "fit_spec",
    "format_text",
    "load",
    "nearest_codes",
    "parse_plan_block",
    "program_under",
    "read_source",
]

# The functions import what they need: `import llmspec.dsl` itself costs next to nothing.


def load(
    path: str | os.PathLike[str], *, train: str | None = None, text: str | None = None
) -> Program:
    """The checked spec. `text`: its contents, when they are not the file's. Errors: SpecError."""
    from llmspec.dsl.checker import check_text

    program, sources = check_text(os.fspath(path), text, train)
    if program is None or sources.diagnostics:
        raise SpecError(sources.diagnostics, sources.texts)
    return program


def check(path: str | os.PathLike[str], *, text: str | None = None) -> tuple[Diagnostic, ...]:
    """Every fault of the spec, none raised. Several train blocks are each checked."""
    from llmspec.dsl.checker import check_everything

    return check_everything(os.fspath(path), text)


def explicit(program: Program) -> str:
    """The spec with every default written down; it loads to an equal program."""
    from llmspec.dsl.spell_out import explicit_text

    return explicit_text(program)


def program_under(text: str, program: Program) -> Program:
    """The program under lines like `tensor = 4, zero in [1, 3], precision = fp32`, which stand in
    for its own about the same keys. Errors: SpecError."""
    from llmspec.dsl.asked import program_under

    return program_under(text, program)


def parse_plan_block(text: str) -> tuple[Constraint, ...]:
    """The constraints of a `plan { … }` block, as `llmspec plan` prints it. Errors: SpecError."""
    from llmspec.dsl.plans import parse_block

    return parse_block(text)


def cluster_from_words(words: str) -> Cluster:
    """`8xH100`: one node of 8; `4x8xH100`: four of them; `2xcpu`. Errors: SpecError."""
    from llmspec.dsl.hardware import cluster_from_words

    return cluster_from_words(words)


def fit_spec(model: str, *, on: str, tokens: int | None = None, batch: int | None = None) -> str:
    """The spec that asks how a library model trains on these devices (`8xH100`).

    tokens: per sequence. batch: sequences per step. Errors: SpecError for unknown names.
    """
    from llmspec.dsl.fit import fit_text

    return fit_text(model, on=on, tokens=tokens, batch=batch)


def read_source(path: str | os.PathLike[str]) -> str:
    """The text of a spec. Errors: SpecError when it is missing, too large or no text."""
    from llmspec.dsl.sources import read_text

    name = os.fspath(path)
    text, problem = read_text(name)
    if problem is not None:
        code, message = problem
        raise SpecError([Diagnostic(code=code, message=message.format(path=name))], {})
    return text


def format_text(text: str, path: str = "spec") -> str:
    """`llmspec fmt`. Errors: SpecError for a text whose brackets or strings are open."""
    from llmspec.dsl.format import format_text, unformattable

    if faults := unformattable(path, text):
        raise SpecError(faults, {path: text})
    return format_text(text, path)


def explain(code: str) -> str | None:
    """The page of an error's code as markdown; None when there is no such code."""
    from llmspec.dsl.diagnostics.codes import explain

    return explain(code)


def nearest_codes(code: str) -> tuple[str, ...]:
    """Helps for a code that does not exist."""
    from llmspec.dsl.diagnostics.codes import nearest_codes

    return nearest_codes(code)
