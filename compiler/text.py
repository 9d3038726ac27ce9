"""Lines of Python with indentation, before the formatter sees them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmspec.compiler.errors import InternalError

WIDTH = 100


class Text:
    """Collects lines at the current indentation."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._depth = 0

    def line(self, text: str = "") -> None:
        line = "    " * self._depth + text if text else ""
        self.lines += _wrapped(line) if len(line) > WIDTH else [line]

    def blank(self, count: int = 1) -> None:
        self.lines += [""] * count

    @contextmanager
    def block(self, head: str) -> Iterator[None]:
        self.line(head)
        self._depth += 1
        yield
        self._depth -= 1

    def render(self) -> str:
        return "\n".join(self.lines) + "\n"


def _wrapped(line: str) -> list[str]:
    """A comment as several; anything else is the formatter's."""
    words = line.lstrip()
    if not words.startswith("# "):
        return [line]
    lead = line[: len(line) - len(words)] + "# "
    return textwrap.wrap(words[2:], WIDTH, initial_indent=lead, subsequent_indent=lead)


def formatted(source: str, name: str) -> str:
    """The source as ruff formats it and sorts its imports.

    Errors: InternalError when it is not Python.
    """
    for verb in (["check", "--select", "I,F401", "--fix", "--exit-zero"], ["format"]):
        command = [_ruff(), *verb, "--isolated", "--quiet", "--line-length", str(WIDTH)]
        if verb[0] == "check":
            command += [
                "--config",
                'lint.isort.known-local-folder = ["runtime", "model", "kernels"]',
            ]
        done = subprocess.run(
            [*command, "--stdin-filename", name, "-"], input=source, capture_output=True, text=True
        )
        if done.returncode:
            raise InternalError(f"{name} is not valid Python: {done.stderr}\n{source}")
        source = done.stdout
    return source


def _ruff() -> str:
    beside = Path(sys.executable).parent / "ruff"
    return str(beside) if beside.exists() else "ruff"


def plural(count: int, word: str) -> str:
    more = "es" if word.endswith("ch") else "s"
    return f"{count} {word}" if count == 1 else f"{count} {word}{more}"


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def in_bytes(count: float) -> str:
    """`64 MiB`, three digits at most."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"


def quoted(text: str) -> str:
    """Text from a user's file as it may stand in a comment or docstring: one line, printable,
    no quotes.
    """
    plain = "".join(c if c.isprintable() and c not in '"\\' else " " for c in text)
    return " ".join(plain.split())[:120]
