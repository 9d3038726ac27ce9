"""Plans and emitted programs that people review as text; `--update-golden`, then the diff."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmspec.compiler import driver
from llmspec.compiler.render_plan import render_found
from llmspec.compiler.search.search import Found
from tests.conftest import GOLDEN, Golden

ROOT = Path(__file__).resolve().parents[2]
SPECS = {
    **{name: ROOT / "examples" / f"{name}.llmspec" for name in ("quickstart", "llama3_8b_long")},
    **{path.stem: path for path in sorted((GOLDEN / "specs").glob("*.llmspec"))},
}


@pytest.mark.parametrize("name", SPECS)
def test_golden(name: str, golden: Golden) -> None:
    session = driver.open_session(str(SPECS[name]))
    found = driver.find_plan(session)
    assert isinstance(found, Found), f"no plan fits: {found}"
    files = driver.emit_plan(session, found.plan)
    golden.check(f"plans/{name}.txt", render_found(found) + "\n")
    for file in ("model.py", "train.py", "kernels.py", "test_kernels.py"):
        if file in files:
            golden.check(f"emitted/{name}/{file}", files[file])


def test_no_orphans() -> None:
    plans = {path.stem for path in (GOLDEN / "plans").iterdir()}
    emitted = {path.name for path in (GOLDEN / "emitted").iterdir()}
    assert plans == set(SPECS)
    assert emitted == set(SPECS)
