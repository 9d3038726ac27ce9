"""What the ledger says of offload, against the bytes alive while emitted programs really run."""

from __future__ import annotations

import pytest

from tests.compiler.cost.test_live import MODELS, spec_text
from tests.compiler.verify.models import planned
from tests.live_bytes import measure

CASES = {
    "microbatch = 2; offload = optimizer": 1,
    "microbatch = 4; offload = activations": 1,
    "microbatch = 4; offload = activations; recompute = full": 1,
    "microbatch = 8; offload = [activations, optimizer]": 1,
    "data = 2; zero = 0; microbatch = 2; offload = [activations, optimizer]": 2,
    "data = 2; zero = 1; microbatch = 2; offload = optimizer": 2,
    "data = 2; zero = 2; microbatch = 2; offload = activations": 2,
    "data = 2; zero = 3; microbatch = 2; offload = optimizer": 2,
    "data = 2; zero = 3; microbatch = 2; offload = parameters": 2,
    "data = 2; zero = 3; microbatch = 2; offload = [activations, parameters]": 2,
    "tensor = 2; sequence = on; microbatch = 4; offload = activations": 2,
    "pipeline = 2; microbatch = 2; schedule = 1f1b; offload = activations": 2,
    "pipeline = 2; microbatch = 2; schedule = gpipe; offload = activations": 2,
    "pipeline = 2; microbatch = 2; schedule = gpipe; recompute = full; offload = activations": 2,
    "pipeline = 2; microbatch = 2; schedule = interleaved; offload = activations": 2,
    "pipeline = 2; microbatch = 2; schedule = zbv; offload = activations": 2,
}
"""Pins, and how many processes they are for."""


def measured(model: str, devices: int, pins: str) -> tuple[int, int, int, int]:
    """(peak of the device, as predicted; of the host, as predicted)"""
    session, plan = planned(spec_text(MODELS[model], devices, pins))
    known = plan.predicted["predicted"]
    predicted = sum(size for part, size in known["memory_bytes"].items() if part != "fixed")
    ranks = measure(session, plan)
    peak, host = max(r.peak for r in ranks), max(r.host for r in ranks)
    return peak, predicted, host, known["peak_host_memory_bytes"]


def check_fall(model: str, pins: str) -> None:
    """The device's peak falls by what the plan says, and the host has what it says."""
    devices = CASES[pins]
    words = [word for word in pins.split("; ") if not word.startswith("offload")]
    whole, said_whole, none, _ = measured(model, devices, "; ".join(words))
    left, said_left, host, said_host = measured(model, devices, pins)
    assert none == 0
    assert whole - left == pytest.approx(said_whole - said_left, rel=0.05)
    assert host == pytest.approx(said_host, rel=0.05)


@pytest.mark.parametrize("pins", [*CASES][:2])
def test_memory_falls_as_predicted(pins: str) -> None:
    check_fall("llama", pins)


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("pins", CASES)
def test_memory_falls_by_every_offload_as_predicted(model: str, pins: str) -> None:
    check_fall(model, pins)


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_the_peak_of_second_parts(model: str) -> None:
    """What they need is back on the device: next to nothing is saved, and the ledger says so."""
    pins = "pipeline = 2; microbatch = 2; schedule = zero_bubble; interleave = 1"
    pins += "; offload = activations"
    peak, said, host, said_host = measured(model, 2, pins)
    assert peak == pytest.approx(said, rel=0.03)
    assert host == pytest.approx(said_host, rel=0.05)
