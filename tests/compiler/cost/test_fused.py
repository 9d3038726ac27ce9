"""What kernels keep and take, predicted and real."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from llmspec.compiler import driver
from llmspec.compiler.emit.package import write
from tests.compiler.cost.test_live import CASES, MODELS, spec_text
from tests.compiler.cost.test_saved import kept_bytes
from tests.compiler.verify.models import MODELS as LARGE
from tests.compiler.verify.models import planned
from tests.compiler.verify.models import spec_text as on_gpus
from tests.live_bytes import measure
from tests.processes import run


def kept(rank: int, folder: str, sizes: dict[str, int], rows: int, tokens: int) -> int:
    import sys

    import torch

    sys.path.insert(0, folder)
    import model

    from runtime.mesh import Mesh

    emitted = model.Model(Mesh.create(torch.device("cpu"), **sizes))
    emitted.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in emitted.parameters():
            parameter.fill_(0.01)
    ids = torch.zeros(rows, tokens, dtype=torch.int64)
    return kept_bytes(emitted, (ids, ids, torch.arange(rows)))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("ranks", "pins"),
    [
        (1, "microbatch = 2"),
        (2, "tensor = 2; sequence = on; microbatch = 2"),
    ],
)
def test_activations_are_what_autograd_keeps(model: str, ranks: int, pins: str) -> None:
    found = []
    for kernels in ("eager", "triton"):
        text = spec_text(MODELS[model], ranks, f"{pins}; kernels = {kernels}")
        session, plan = planned(text)
        predicted = plan.predicted["predicted"]["memory_bytes"]["activations"]
        with tempfile.TemporaryDirectory() as folder:
            write(driver.emit_plan(session, plan), Path(folder))
            for real in run(ranks, kept, folder, {"tensor": plan.mesh.tensor}, 2, 256):
                assert real == pytest.approx(predicted, rel=0.002)
        found.append(predicted)
    assert found[1] < found[0]


@pytest.mark.parametrize("model", [pytest.param("gpt", marks=pytest.mark.long), "llama"])
def test_the_peak(model: str) -> None:
    text = spec_text(MODELS[model], CASES["microbatch = 4"], "microbatch = 4; kernels = triton")
    session, plan = planned(text)
    parts = plan.predicted["predicted"]["memory_bytes"]
    predicted = sum(size for part, size in parts.items() if part != "fixed")
    assert max(rank.peak for rank in measure(session, plan)) == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("model", LARGE)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_kernels_are_quicker_on_gpus(model: str, recompute: str) -> None:
    steps = []
    for kernels in ("eager", "triton"):
        pins = f"microbatch = 4; recompute = {recompute}; kernels = {kernels}"
        _, plan = planned(on_gpus(LARGE[model], 1, 8, pins, precision="bf16"))
        assert plan.kernels == plan.predicted["plan"]["kernels"] == kernels
        steps.append(plan.predicted["predicted"]["step_time_s"])
    assert 0.8 * steps[0] < steps[1] < 0.99 * steps[0]


def test_on_cpus_they_keep_less_and_take_longer() -> None:
    found = []
    for kernels in ("eager", "triton"):
        _, plan = planned(spec_text(MODELS["llama"], 1, f"microbatch = 4; kernels = {kernels}"))
        found.append(plan.predicted["predicted"])
    assert found[0]["time_s"]["compute"] < found[1]["time_s"]["compute"]
    assert found[0]["memory_bytes"]["activations"] > found[1]["memory_bytes"]["activations"]
