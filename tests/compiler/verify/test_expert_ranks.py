"""Every gradient of programs whose experts lie on several ranks, against one device in float64.

That a token is sent to the same experts on every mesh follows: another choice is another gradient.
"""

from __future__ import annotations

import itertools

import pytest

from llmspec.compiler.verify.plan import verify_plan
from tests.compiler.verify.models import planned, spec_text

MIXTURE = """
model m {
    vocab = 50257; context = 512; width = 1024
    block layer(x) {
        x = x + attention(rmsnorm(x), heads=8, kv_heads=4, causal, rope=10_000)
        x = x + moe(rmsnorm(x), experts=8, top_k=2, EXPERT)
    }
    tokens -> embed -> layer * 8 -> rmsnorm -> unembed
}
"""
EXPERTS = {
    "softmax": "expert=swiglu(ffn=2048), balance=aux(0.01)",
    "sigmoid": "expert=swiglu(ffn=2048), shared=swiglu(ffn=2048), gate=sigmoid, scale=2.5,"
    " groups=4, top_groups=2, balance=bias(rate=0.001, aux=0.0001)",
    "mlp": "expert=mlp(ffn=2048, bias), shared=mlp(ffn=4096), z_loss=0.001, capacity=1.0",
}

Case = tuple[int, int, str]
"""Devices, sequences per step, pins."""

SHORT: list[tuple[str, Case]] = [
    ("sigmoid", (2, 8, "data = 2; expert = 2; zero = 0; microbatch = 2")),
    ("softmax", (4, 8, "data = 4; expert = 2; zero = 3; microbatch = 1")),
    ("mlp", (4, 8, "data = 2; expert = 2; tensor = 2; zero = 2; microbatch = 2; sequence = on")),
]

DATA: list[Case] = [
    *((2, 8, f"data = 2; expert = 2; zero = {z}; microbatch = 2") for z in range(4)),
    *((4, 8, f"data = 4; expert = {e}; zero = {z}; microbatch = 1") for e, z in
      itertools.product((2, 4), range(4))),
    *((4, 8, f"data = 4; shard = 2; expert = {e}; zero = {z}; microbatch = 2") for e, z in
      itertools.product((2, 4), (1, 2, 3))),
    (2, 8, "data = 2; expert = 2; zero = 3; microbatch = 4; recompute = full"),
    (2, 8, "data = 2; expert = 2; zero = 0; microbatch = 1; recompute = full"),
]  # fmt: skip

COMBINED: list[Case] = [
    *(
        (4, 8, f"data = 2; expert = 2; tensor = 2; zero = {z}; microbatch = 2; sequence = {s}")
        for z, s in itertools.product((0, 3), ("on", "off"))
    ),
    (8, 8, "data = 4; expert = 2; tensor = 2; zero = 3; microbatch = 1; recompute = full"),
    *(
        (
            *(4, 8),
            f"data = 2; expert = 2; pipeline = 2; zero = {z}; microbatch = 1; schedule = {s}",
        )
        for z, s in itertools.product(range(4), ("1f1b", "gpipe"))
    ),
    (8, 8, "data = 4; expert = 2; pipeline = 2; zero = 3; microbatch = 1; schedule = 1f1b"),
    (8, 8, "data = 2; expert = 2; pipeline = 2; tensor = 2; zero = 1; microbatch = 2"),
]


def check(experts: str, case: Case) -> None:
    devices, batch, pins = case
    model = MIXTURE.replace("EXPERT", EXPERTS[experts])
    session, plan = planned(spec_text(model, devices, batch, pins))
    report, small = verify_plan(session, plan, largest=4)
    assert small.mesh == plan.mesh, "the mesh under test is the plan's"
    assert small.mesh.expert > 1, "experts are split"
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]


@pytest.mark.parametrize(("experts", "case"), SHORT, ids=lambda c: c[2] if len(c) == 3 else c)
def test_gradients(experts: str, case: Case) -> None:
    check(experts, case)


@pytest.mark.long
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("case", DATA + COMBINED, ids=lambda c: c[2])
def test_every_mesh(experts: str, case: Case) -> None:
    check(experts, case)
