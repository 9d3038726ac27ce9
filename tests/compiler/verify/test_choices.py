"""A plan that has chosen what its spec leaves open, saved, opened again and run."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmspec.compiler import driver
from llmspec.compiler.plan import to_json
from llmspec.compiler.search.search import Found
from llmspec.compiler.verify.plan import verify_plan

SPEC = """
import gpt2
model small = gpt2(layers=2, width=32, heads=4, vocab=64, context=16)
cluster laptop { node = 2 * cpu }
train t {
    model = small; cluster = laptop; dataset = synthetic; batch = 8 sequences; steps = 2
    optimizer in [adamw(lr=0.01), sgd(lr=0.05, momentum=0.5)]
}
plan { data = 2; zero = 2 }
"""


@pytest.mark.long
def test_a_saved_choice_is_the_program_that_runs(tmp_path: Path) -> None:
    spec = tmp_path / "small.llmspec"
    spec.write_text(SPEC)
    found = driver.find_plan(driver.open_session(str(spec)))
    assert isinstance(found, Found)
    saved = tmp_path / "plan.json"
    saved.write_text(to_json(found.plan))
    session, plan = driver.open_plan(str(saved))
    chosen = session.program.train.optimizer.name
    assert plan.choices["optimizer"].startswith(chosen)
    report, _ = verify_plan(session, plan)
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]
