"""A simulated step is the predicted one, and its trace is one that viewers open."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from llmspec.compiler import driver
from llmspec.compiler.errors import Refused
from llmspec.compiler.search.search import Found
from llmspec.compiler.simulate.slices import MESSAGES
from llmspec.compiler.simulate.step import Simulated, simulate, simulated_object
from llmspec.compiler.simulate.trace import trace_json
from llmspec.compiler.simulate.words import render_simulated
from tests.compiler.verify.models import planned, spec_text
from tests.conftest import Golden

ROOT = Path(__file__).resolve().parents[3]
MODEL = """
import llama
model m = llama(layers=8, width=256, heads=8, kv_heads=4, ffn=512, vocab=512, context=256)
"""
PINS = {
    "microbatch = 4; data = 1": 1,
    "data = 2; tensor = 2; zero = 3; microbatch = 1; recompute = full": 4,
    "context = 2; data = 2; zero = 1; microbatch = 2": 4,
    "pipeline = 4; schedule = gpipe; microbatch = 1": 4,
    "pipeline = 2; data = 2; zero = 1; schedule = 1f1b; microbatch = 1": 4,
    "pipeline = 2; data = 2; zero = 2; schedule = interleaved; interleave = 2; microbatch = 1": 4,
    "pipeline = 2; tensor = 2; schedule = zero_bubble; microbatch = 1; recompute = full": 4,
    "pipeline = 2; data = 2; zero = 0; schedule = zbv; microbatch = 1": 4,
    "pipeline = 2; schedule = dualpipev; microbatch = 1; offload = optimizer": 2,
}


def simulated(pins: str) -> tuple[Simulated, dict]:
    session, plan = planned(spec_text(MODEL, PINS[pins], 16, pins, "bf16"))
    found = simulate(session.program, plan, session.graph(plan.microbatch))
    return found, plan.predicted["predicted"]


@pytest.mark.parametrize("pins", PINS)
def test_the_step_is_the_predicted_one(pins: str) -> None:
    found, predicted = simulated(pins)
    assert found.step_s == pytest.approx(predicted["step_time_s"], rel=1e-8)
    assert sum(found.times.parts().values()) == pytest.approx(found.step_s)
    for event in found.events:
        spent = sum(part.spent_s for part in found.slices.of(event))
        assert spent == pytest.approx(event.spent_s, abs=1e-12)
    for one in found.ranks:
        assert sum(one.parts.values()) + one.waits_s == pytest.approx(found.step_s)
    # what the busiest rank does is what the plan says of it, part by part
    waited = predicted["time_s"]["pipeline_bubble"] + predicted["time_s"][MESSAGES]
    busiest = min(found.ranks, key=lambda r: r.waits_s)
    held = busiest.parts.pop(MESSAGES, 0.0)
    assert busiest.waits_s + held == pytest.approx(waited, rel=1e-6, abs=1e-9)
    for part, seconds in busiest.parts.items():
        assert seconds == pytest.approx(predicted["time_s"][part], rel=1e-6)
    assert sum(found.on_path().values()) == pytest.approx(found.step_s)
    assert sum(found.ranks_on_path().values()) == pytest.approx(found.step_s)


@pytest.mark.parametrize("pins", [p for p in PINS if "pipeline" in p][1:4])
def test_the_trace_opens(pins: str) -> None:
    """What viewers ask of it: complete events that nest on their thread, names for all processes
    and threads, and arrows with two ends."""
    found, _ = simulated(pins)
    text = trace_json(found)
    assert text == trace_json(found)
    trace = json.loads(text)
    assert trace["otherData"]["step_time_s"] == pytest.approx(found.step_s)
    by_phase = defaultdict(list)
    for entry in trace["traceEvents"]:
        by_phase[entry["ph"]].append(entry)
    assert set(by_phase) == {"M", "X", "s", "f"}
    named = {(e["pid"], e["tid"]) for e in by_phase["M"] if e["name"] == "thread_name"}
    threads = defaultdict(list)
    for entry in by_phase["X"]:
        threads[entry["pid"], entry["tid"]].append((entry["ts"], entry["ts"] + entry["dur"]))
    assert set(threads) == named
    for spans in threads.values():
        open_until: list[float] = []
        for start, stop in sorted(spans, key=lambda s: (s[0], -s[1])):
            while open_until and open_until[-1] <= start + 1e-6:
                open_until.pop()
            assert not open_until or stop <= open_until[-1] + 1e-6
            open_until.append(stop)
    assert max(stop for spans in threads.values() for _, stop in spans) == pytest.approx(
        found.step_s * 1e6, abs=1e-3
    )
    assert {e["id"] for e in by_phase["s"]} == {e["id"] for e in by_phase["f"]}
    assert len(by_phase["s"]) == sum(e.kind in ("SEND_F", "SEND_B") for e in found.events)
    ends = {e["id"]: e["ts"] for e in by_phase["f"]}
    assert all(e["ts"] <= ends[e["id"]] for e in by_phase["s"])


def test_an_edited_list_is_played_as_it_stands() -> None:
    """One backward after each forward on the last rank, in place of what GPipe says."""
    session, plan = planned(
        spec_text(MODEL, 2, 8, "pipeline = 2; schedule = gpipe; microbatch = 1", "bf16")
    )
    own = [f"1{kind}{m}" for m in range(8) for kind in ("RECV_F", "F", "B", "SEND_B")]
    edited = replace(plan, actions=(plan.actions[0], (*own, "1REDUCE_GRAD")))
    found = simulate(session.program, edited, session.graph(1))
    assert [e.kind for e in found.events if e.rank == 1 and e.kind in "FB"] == ["F", "B"] * 8
    backwards = tuple(word for word in own if "B" in word)
    forwards = tuple(word for word in own if "F" in word)
    stuck = replace(plan, actions=(plan.actions[0], backwards + forwards))
    with pytest.raises(Refused, match="E0804"):
        simulate(session.program, stuck, session.graph(1))


@pytest.mark.long
def test_sixteen_thousand_devices_in_seconds() -> None:
    """By the clock of this process, searching left out."""
    import time

    session = driver.open_session(str(ROOT / "examples" / "llama3_405b.llmspec"))
    found = driver.find_plan(session)
    assert isinstance(found, Found)
    graph = session.graph(found.plan.microbatch)
    start = time.process_time()
    step = simulate(session.program, found.plan, graph)
    text = trace_json(step)
    assert time.process_time() - start < 10
    assert step.step_s == pytest.approx(found.plan.predicted["predicted"]["step_time_s"], rel=1e-8)
    assert sum(b - a + 1 for a, b in (r.devices for r in step.ranks)) == 16_384
    assert all(a.devices[1] + 1 == b.devices[0] for a, b in pairwise(step.ranks))
    assert len(text) < 64e6


def test_in_words(golden: Golden) -> None:
    found, _ = simulated("pipeline = 2; data = 2; zero = 1; schedule = 1f1b; microbatch = 1")
    golden.check("cli/simulate.txt", render_simulated(simulated_object(found)) + "\n")
