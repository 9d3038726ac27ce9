"""Memory and messages of each precision: the program itself against the plan's predictions."""

from __future__ import annotations

import pytest

from llmspec.compiler.dryrun.run import dry_run
from tests.compiler.verify.models import planned, spec_text

MODEL = """
import llama
model m = llama(layers=8, width=128, heads=4, kv_heads=2, ffn=384, vocab=512, context=256)
"""
PRECISIONS = (
    "fp32",
    "bf16",
    "bf16(moments=bf16, reduce=bf16)",
    "bf16(master=none)",
    "bf16(master=none, moments=bf16, reduce=bf16, rounding=stochastic)",
    "fp16",
    "fp16(moments=bf16, reduce=fp16)",
)
PINS = {
    "microbatch = 4": 1,
    "data = 2; zero = 0; microbatch = 4": 2,
    "data = 2; zero = 2; microbatch = 4": 2,
    "data = 2; zero = 3; microbatch = 4": 2,
    "pipeline = 2; microbatch = 2; schedule = 1f1b": 2,
}
REDUCTIONS = ("all_reduce", "reduce_scatter", "all_gather")


def check(precision: str, pins: str, within: float = 0.05) -> None:
    """The peak, what rests between steps, and the bytes that data ranks send."""
    session, plan = planned(spec_text(MODEL, PINS[pins], 16, pins, precision))
    roles, said = dry_run(session, plan), plan.predicted["predicted"]
    parts = said["memory_bytes"]
    predicted = sum(size for part, size in parts.items() if part != "fixed")
    assert max(role.peak_bytes for role in roles) == pytest.approx(predicted, rel=within)
    kept = parts["parameters"] + parts["optimizer"]
    resting = max(role.resting_bytes for role in roles)
    assert kept < resting <= 1.01 * (kept + parts["gradients"])
    if plan.mesh.pipeline == 1:
        for kind in REDUCTIONS:
            # what measures, rather than trains, sends a few numbers
            sent = sum(s * n for k, _, s, n in roles[0].collectives if k == kind and s > 1000)
            listed = [c for c in said["collectives"] if c["kind"] == kind and c["bytes"] > 1000]
            assert sent == sum(c["bytes"] * c["count"] for c in listed), kind


@pytest.mark.parametrize("precision", PRECISIONS[1:4])
def test_precision(precision: str) -> None:
    check(precision, "data = 2; zero = 2; microbatch = 4")


@pytest.mark.long
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pins", PINS)
def test_every_precision(precision: str, pins: str) -> None:
    check(precision, pins)


def test_a_ramp_is_run_at_its_final_size() -> None:
    pins = "pipeline = 2; microbatch = 2; schedule = 1f1b"
    text = spec_text(MODEL, 2, 8, pins, "fp16")
    ramp = "ramp(from=2 sequences, to=8 sequences, steps=4)"
    whole, grown = planned(text), planned(text.replace("8 sequences", ramp))
    assert [role.peak_bytes for role in dry_run(*whole)] == [
        role.peak_bytes for role in dry_run(*grown)
    ]
