"""What can go wrong in the compiler: faults of the user's file, and faults of ours."""

from __future__ import annotations

from llmspec.dsl import Diagnostic, SpecError
from llmspec.dsl.program import Span


class Unsupported(Exception):
    """The spec asks for something that has no meaning yet. `span` points at it when known."""

    def __init__(self, what: str, span: Span | None = None):
        super().__init__(what)
        self.what, self.span = what, span


class Refused(SpecError):
    """A fault of the user's that only the compiler can see, already in terms of their file."""

    def __init__(self, *diagnostics: Diagnostic):
        super().__init__(diagnostics, {})


class InternalError(Exception):
    """A broken invariant: our bug, never the user's."""
