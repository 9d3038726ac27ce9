"""Gradients of emitted programs that keep things in host memory, alone and with what else saves."""

from __future__ import annotations

import itertools

import pytest

from llmspec.compiler.driver import emit_plan
from llmspec.compiler.verify.plan import verify_plan
from tests.compiler.verify.models import MODELS, planned, spec_text

WAYS = (
    *("activations", "optimizer", "[activations, optimizer]"),
    *("parameters", "[activations, parameters]"),
)
SHARDED = "data = 2; zero = {zero}; microbatch = 2"

FEW = [
    (2, 8, f"{SHARDED.format(zero=0)}; offload = [activations, optimizer]"),
    (2, 8, f"{SHARDED.format(zero=3)}; offload = [parameters, activations]; recompute = full"),
    (2, 8, "pipeline = 2; schedule = 1f1b; microbatch = 2; offload = activations"),
    (2, 4, "tensor = 2; sequence = on; microbatch = 2; offload = activations"),
]

EVERY = [
    (2, 8, f"{SHARDED.format(zero=zero)}; offload = {way}; recompute = {again}")
    for zero, way, again in itertools.product(range(4), WAYS, ("none", "full"))
    if zero == 3 or "parameters" not in way
]
EVERY += [
    (2, 4, f"tensor = 2; sequence = {s}; microbatch = 2; offload = {way}; recompute = {again}")
    for s, way, again in itertools.product(("on", "off"), WAYS[:3], ("none", "full"))
]
EVERY += [
    (2, 8, f"pipeline = 2; schedule = {s}; microbatch = 2; offload = {way}; recompute = {again}")
    for s, way, again in itertools.product(("gpipe", "1f1b"), WAYS[:3], ("none", "full"))
]
EVERY += [
    (
        *(4, 8),
        f"pipeline = 2; data = 2; zero = {zero}; schedule = {s}; microbatch = 1; offload = {way}",
    )
    for zero, s, way in itertools.product(range(4), ("gpipe", "1f1b"), WAYS)
    if zero == 3 or "parameters" not in way
]
EVERY += [
    (4, 8, f"tensor = 2; data = 2; zero = {zero}; microbatch = 2; offload = {way}")
    for zero, way in itertools.product((0, 1, 3), WAYS)
    if zero == 3 or "parameters" not in way
]
EVERY += [
    (4, 8, f"data = 4; shard = 2; zero = {zero}; microbatch = 1; offload = {way}")
    for zero, way in itertools.product((1, 2, 3), WAYS)
    if zero == 3 or "parameters" not in way
]


def check(model: str, case: tuple[int, int, str]) -> None:
    devices, batch, pins = case
    session, plan = planned(spec_text(MODELS[model], devices, batch, pins))
    wanted = pins.partition("offload = ")[2].partition(";")[0].strip("[]").split(", ")
    assert set(plan.offload) == set(wanted)
    report, small = verify_plan(session, plan, largest=4)
    assert small.offload == plan.offload
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]


@pytest.mark.parametrize("case", FEW, ids=lambda c: c[2])
def test_gradients_with_offload(case) -> None:
    check("llama", case)


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", EVERY, ids=lambda c: c[2])
def test_every_offload(model, case) -> None:
    check(model, case)


def test_what_programs_say_of_it() -> None:
    pins = f"{SHARDED.format(zero=3)}; offload = [activations, parameters]"
    session, plan = planned(spec_text(MODELS["llama"], 2, 8, pins))
    files = emit_plan(session, plan)
    assert "In host memory: activations and parameters and the optimizer." in files["train.py"]
    assert "with self.host.keep(block, x):" in files["model.py"]
    assert "runtime/host_activations.py" in files and "runtime/host_optimizer.py" not in files
    session, plan = planned(spec_text(MODELS["llama"], 2, 8, "offload = optimizer; data = 2"))
    files = {n: " ".join(t.split()) for n, t in emit_plan(session, plan).items()}
    assert "optimizer = on_host( optimizers.adamw(" in files["train.py"]
    assert "runtime/host_activations.py" not in files
    assert "of host memory a process" in files["train.py"]
