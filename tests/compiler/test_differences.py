"""What differs between two plans, in data and in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmspec.compiler.differences import differences, render_differences
from llmspec.compiler.plan import EVERYTHING, Plan, Stretch
from tests.compiler.verify.models import planned, spec_text
from tests.conftest import Golden

MODEL = """
import llama
model m = llama(layers=4, width=64, heads=4, kv_heads=2, ffn=128, vocab=256, context=64)
"""


@pytest.fixture(scope="module")
def pair() -> tuple[Plan, Plan]:
    one = "pipeline = 2; schedule = 1f1b; microbatch = 1; recompute = none"
    other = "tensor = 2; microbatch = 2; recompute = none"
    return tuple(planned(spec_text(MODEL, 2, 8, pins, "bf16"))[1] for pins in (one, other))


def test_equal_plans_do_not_differ(pair: tuple[Plan, Plan]) -> None:
    found = differences(pair[0], pair[0])
    assert found["decisions"] == found["predicted"] == []
    assert render_differences(found) == f"Plan {pair[0].plan_hash}: no changes"


def test_every_changed_decision_is_named(pair: tuple[Plan, Plan]) -> None:
    plan = pair[0]
    (first, stop), (_, last) = plan.stages
    edited = replace(
        plan,
        stages=((first, stop - 1), (stop - 1, last)),
        recompute=plan.recompute | {"layer": (Stretch(blocks=4, again=EVERYTHING),)},
        # as many words in another order
        actions=(plan.actions[0], plan.actions[1][::-1]),
    )
    found = differences(plan, edited)
    assert [one["key"] for one in found["decisions"]] == ["actions", "recompute.layer", "stages"]
    assert found["predicted"] == []
    assert "The same decisions" not in render_differences(found)


def test_what_was_left_open_is_a_decision(pair: tuple[Plan, Plan]) -> None:
    one, other = (replace(pair[0], choices={"precision": word}) for word in ("bf16", "fp32"))
    assert len({plan.plan_hash for plan in (pair[0], one, other)}) == 3
    (found,) = differences(one, other)["decisions"]
    assert found == {"key": "precision", "before": "bf16", "after": "fp32"}
    assert "  + precision  bf16" in render_differences(differences(pair[0], one))


def test_parts_of_both_add_up(pair: tuple[Plan, Plan]) -> None:
    """What the parts move by is what the whole moves by."""
    moved = {c["key"]: c["after"] - c["before"] for c in differences(*pair)["predicted"]}
    for whole, group in (("step_time_s", "time_s"), ("peak_memory_bytes", "memory_bytes")):
        parts = sum(by for key, by in moved.items() if key.startswith(f"{group}."))
        assert parts == pytest.approx(moved[whole], rel=1e-6)


def test_in_words(pair: tuple[Plan, Plan], golden: Golden) -> None:
    golden.check("cli/diff.txt", render_differences(differences(*pair)) + "\n")
