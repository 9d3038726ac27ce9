"""What verbs print with: products on stdout, status on stderr with the verb in twelve columns."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from llmspec.dsl import SpecError
from llmspec.dsl.diagnostics.render import as_json, render_human

OK, DIAGNOSTICS, USAGE, CHANGED = 0, 1, 2, 3
"""Exit statuses: fine; diagnostics; wrong use of the command; `plan --check` found a change."""

_status = Console(stderr=True, highlight=False, soft_wrap=True)
_product = Console(highlight=False, soft_wrap=True)


def status(verb: str, text: str) -> None:
    """One line of progress, as cargo prints it."""
    _status.print(Text(f"{verb:>12} ", style="bold green"), Text(text), sep="", end="\n")


def product(text: str) -> None:
    _product.print(Text(text.rstrip("\n")))


def product_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, sort_keys=True) + "\n")


def show_faults(error: SpecError, *, as_data: bool) -> int:
    """Print diagnostics; the exit status."""
    if as_data:
        product_json({"schema": 1, "diagnostics": [as_json(d) for d in error.diagnostics]})
        return DIAGNOSTICS
    text = render_human(error.diagnostics, error.sources | _read_sources(error))
    _status.print(_coloured(text), end="")
    return DIAGNOSTICS


def _read_sources(error: SpecError) -> dict[str, str]:
    """Files that a diagnostic points into and that nobody has read yet."""
    found: dict[str, str] = {}
    for diagnostic in error.diagnostics:
        path = diagnostic.span.path if diagnostic.span else ""
        if path and path not in error.sources and Path(path).is_file():
            found[path] = Path(path).read_text(errors="replace")
    return found


def _coloured(text: str) -> Text:
    out = Text(text)
    out.highlight_regex(r"(?m)^error\[E\d+\]", "bold red")
    out.highlight_regex(r"(?m)= (help|note):", "bold cyan")
    return out


def fault(message: str, *helps: str) -> int:
    """A fault of the command line itself."""
    _status.print(Text("error: ", style="bold red") + Text(message), sep="")
    for text in helps:
        _status.print(Text(f"  help: {text}"))
    return USAGE
