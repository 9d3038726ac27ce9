"""Plans and emitted programs that people review as text; `--update-golden`, then the diff."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmspec.compiler import driver
from llmspec.compiler.render_plan import render_found
from llmspec.compiler.search.search import Found
from tests.conftest import GOLDEN, Golden
from tests.end_to_end import programs

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.llmspec"))}
SPECS = {path.stem: path for path in sorted((GOLDEN / "specs").glob("*.llmspec"))}
LARGE = ("llama3_70b", "llama3_405b", "mixtral_8x7b", "deepseek_v3", "gpt_1t")
"""Whose search takes longer."""
READ = {"quickstart", "llama3_8b_long", *SPECS}
"""Whose programs are reviewed too, not only their plans."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.long] * (n in LARGE)) for n in EXAMPLES | SPECS],
)
def test_golden(name: str, golden: Golden, tmp_path: Path) -> None:
    """A plan that fits, and a program of modest length that no tool has anything against."""
    session = driver.open_session(str((EXAMPLES | SPECS)[name]), trust=True)
    found = driver.find_plan(session)
    assert isinstance(found, Found), f"no plan fits: {found}"
    golden.check(f"plans/{name}.txt", render_found(found) + "\n")
    files = driver.compile_plan(session, found.plan, tmp_path)
    assert {"model.py", "train.py", "plan.json", "report.html", "launch.sh"} <= set(files)
    code = [file for file in CODE if file in files]
    lines = {file: files[file].count("\n") for file in code}
    assert lines["model.py"] + lines["train.py"] < 650 and sum(lines.values()) < 1500
    assert not programs.ruff_says(tmp_path)
    if name in LARGE:
        assert not programs.mypy_says(tmp_path)
    if name in READ:
        for file in code:
            golden.check(f"emitted/{name}/{file}", files[file])


CODE = ("model.py", "train.py", "kernels.py", "test_kernels.py")


def test_no_orphans() -> None:
    plans = {path.stem for path in (GOLDEN / "plans").iterdir()}
    emitted = {path.name for path in (GOLDEN / "emitted").iterdir()}
    assert plans | set(LARGE) == EXAMPLES.keys() | SPECS.keys()
    assert emitted == READ
