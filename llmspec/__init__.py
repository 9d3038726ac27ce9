"""llmspec: from a small spec to the parallel PyTorch training program an expert would have written.

The Python face of the command line. Nothing heavy is imported until a function is called.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmspec.dsl import Diagnostic

__all__ = ["NoPlan", "check", "compile", "plan"]

Path = str | os.PathLike[str]


def check(path: Path) -> tuple[Diagnostic, ...]:
    """Every fault of a spec, none of them raised; empty when it is fine."""
    from llmspec import dsl

    return dsl.check(path)


def plan(path: Path, *, train: str | None = None, trust: bool = False) -> dict[str, Any]:
    """What `llmspec plan PATH --json` prints: docs/json.md.

    trust: whether the file of a `python(…)` model may run.
    Errors: llmspec.dsl.SpecError with every fault of the file.
    """
    from llmspec.compiler import driver
    from llmspec.compiler.render_plan import face

    return face(driver.find_plan(driver.open_session(os.fspath(path), train=train, trust=trust)))


def compile(
    path: Path, out: Path | None = None, *, train: str | None = None, trust: bool = False
) -> dict[str, str]:
    """Write the training program of a spec, or of a saved plan, into the folder `out`, which is by
    default `build/NAME` beside the spec. Returns its files: relative path -> text.

    Errors: llmspec.dsl.SpecError with every fault of the file; NoPlan when no plan fits.
    """
    from pathlib import Path as Folder

    from llmspec.compiler import driver
    from llmspec.compiler.search.search import Infeasible

    name = os.fspath(path)
    if driver.is_plan_file(name):
        session, chosen = driver.open_plan(name, trust=trust)
    else:
        session = driver.open_session(name, train=train, trust=trust)
        found = driver.find_plan(session)
        if isinstance(found, Infeasible):
            raise NoPlan(found)
        chosen = found.plan
    folder = driver.default_folder(session.program) if out is None else Folder(out)
    return driver.compile_plan(session, chosen, folder)


class NoPlan(Exception):
    """No plan fits the memory budget. `found` holds the smallest plan's ledger and the ways out."""

    def __init__(self, found: Any):
        super().__init__(f"no plan fits the budget; the smallest: {found.best}")
        self.found = found
