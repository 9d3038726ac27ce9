"""Every gradient of programs with fused kernels, which on CPUs run their plain functions."""

from __future__ import annotations

import pytest

from llmspec.compiler import driver
from llmspec.compiler.kernels.kernel import Kernel
from llmspec.compiler.verify.plan import verify_plan
from tests.compiler.verify.models import MODELS, planned, spec_text

Case = tuple[int, int, str]

CASES: list[Case] = [
    (1, 8, "microbatch = 4"),
    (4, 8, "tensor = 2; data = 2; zero = 3; microbatch = 2; sequence = on"),
]
MORE: list[Case] = [
    (1, 8, "microbatch = 8; recompute = full"),
    (1, 8, "microbatch = 8; recompute = selective"),
    (2, 8, "data = 2; zero = 1; microbatch = 2"),
    (2, 8, "tensor = 2; sequence = off; microbatch = 4"),
    (2, 8, "context = 2; context_style = ring; microbatch = 4; zero = 0"),
    (2, 8, "context = 2; context_style = ulysses; microbatch = 4; zero = 1"),
    (4, 8, "pipeline = 2; tensor = 2; schedule = zero_bubble; microbatch = 2"),
    (4, 8, "pipeline = 2; data = 2; zero = 1; schedule = 1f1b; microbatch = 1; recompute = full"),
]


def check(model: str, case: Case, kernels: str = "triton") -> None:
    devices, batch, pins = case
    text = spec_text(MODELS[model], devices, batch, f"{pins}; kernels = {kernels}")
    session, plan = planned(text)
    layer = driver.lower_plan(session, plan).units["layer"]
    assert sum(isinstance(n.target, Kernel) for n in layer.calls()) >= 2
    report, small = verify_plan(session, plan, largest=4)
    assert small.kernels == kernels
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[2])
def test_gradients(model: str, case: Case) -> None:
    check(model, case)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and not compiled: what inductor makes of them is tested once, below."""
    monkeypatch.setenv("LLMSPEC_COMPILE_BACKEND", "aot_eager")


@pytest.mark.parametrize("model", ["gpt", pytest.param("llama", marks=pytest.mark.long)])
@pytest.mark.parametrize("case", CASES[1:], ids=lambda c: c[2])
def test_gradients_traced_for_inductor(model: str, case: Case, traced: None) -> None:
    check(model, case, "inductor")


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", MORE, ids=lambda c: c[2])
def test_more_gradients_traced_for_inductor(model: str, case: Case, traced: None) -> None:
    check(model, case, "inductor")


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
def test_gradients_compiled_by_inductor(model: str) -> None:
    """C++ that inductor writes, in float64."""
    check(
        model,
        (2, 8, "tensor = 2; sequence = on; microbatch = 4; recompute = selective"),
        "inductor",
    )


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", MORE, ids=lambda c: c[2])
def test_more_gradients(model: str, case: Case) -> None:
    check(model, case)
