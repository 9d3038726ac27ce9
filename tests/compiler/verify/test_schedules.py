"""Every gradient under every schedule, on real processes, against one device in float64."""

from __future__ import annotations

import itertools

import pytest

from llmspec.compiler.emit import actions
from llmspec.compiler.orders import Schedule
from llmspec.compiler.verify.plan import verify_plan
from tests.compiler.verify.models import MODELS, planned, spec_text

SEVERAL = [s for s in Schedule if s not in (Schedule.GPIPE, Schedule.ONE_F_ONE_B)]

SHORT = [
    (2, "pipeline = 2; schedule = zero_bubble; interleave = 1; stages = [3, 5]"),
    (2, "pipeline = 2; schedule = zbv; recompute = full"),
    (4, "pipeline = 2; data = 2; zero = 3; schedule = dualpipev"),
    (8, "pipeline = 2; data = 4; shard = 2; zero = 3; schedule = zero_bubble"),
]


def cases() -> list[tuple[int, str]]:
    """(devices, pins)."""
    found = []
    for schedule, ranks in itertools.product(SEVERAL, (2, 4)):
        each = [v for v in (1, 2, 3) if schedule.allows(v) and ranks * v <= 8]
        for v, zero in itertools.product(each, range(4)):
            data = 2 if zero else 1
            pins = f"pipeline = {ranks}; interleave = {v}; schedule = {schedule}"
            found.append((ranks * data, f"{pins}; data = {data}; zero = {zero}"))
        for v in each:
            pins = f"pipeline = {ranks}; interleave = {v}; schedule = {schedule}"
            found.append((2 * ranks, f"{pins}; tensor = 2; sequence = on"))
            found.append((ranks, f"{pins}; recompute = full"))
        uneven = {2: "[1, 2, 2, 3]", 4: "[1, 1, 1, 1, 1, 1, 1, 1]"}[ranks]
        if schedule.allows(2):
            pins = f"pipeline = {ranks}; schedule = {schedule}; stages = {uneven}"
            found.append((ranks, pins))
    return found


def check(model: str, devices: int, pins: str, microbatches: int) -> None:
    data = next((n for n in (2, 4) if f"data = {n}" in pins), 1)
    text = spec_text(MODELS[model], devices, data * microbatches, f"{pins}; microbatch = 1")
    session, plan = planned(text)
    report, small = verify_plan(session, plan, largest=4)
    assert small.mesh == plan.mesh and small.schedule == plan.schedule
    assert small.interleave == plan.interleave, "the stages under test are the plan's"
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]


@pytest.mark.parametrize(("devices", "pins"), SHORT, ids=lambda v: str(v))
def test_gradients(devices: int, pins: str) -> None:
    check("gpt", devices, pins, 4)


def test_long_lists_are_read_from_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "MOST_WORDS", 0)
    check("llama", 2, "pipeline = 2; schedule = 1f1b", 4)


@pytest.mark.long
@pytest.mark.parametrize("microbatches", [4, 8])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("devices", "pins"), cases(), ids=lambda v: str(v))
def test_every_schedule(model: str, devices: int, pins: str, microbatches: int) -> None:
    check(model, devices, pins, microbatches)
