"""Mixtures of experts: every gradient on every mesh, with every way to choose and to balance."""

from __future__ import annotations

import itertools

import pytest

from llmspec.compiler.verify.plan import verify_plan
from tests.compiler.verify.models import planned, spec_text

MODEL = """
model m {{
    vocab = 50257; context = 512; width = 2048
    block layer(x) {{
        x = x + attention(rmsnorm(x), heads=16, kv_heads=4, rope=10_000, causal)
        x = x + moe(rmsnorm(x), {options})
    }}
    tokens -> embed -> layer * 4 -> rmsnorm -> unembed
}}
"""

OPTIONS = {
    "plain": "experts=8, top_k=2, expert=swiglu(ffn=1024)",
    "shared": "experts=8, top_k=2, expert=swiglu(ffn=1024), shared=swiglu(ffn=2048), "
    "balance=aux(0.5), z_loss=0.1",
    "grouped": "experts=16, top_k=4, expert=geglu(ffn=1024), shared=mlp(ffn=1024, bias), "
    "gate=sigmoid, scale=2.5, groups=4, top_groups=2, balance=bias(0.001, aux=0.5)",
    "dropping": "experts=8, top_k=2, expert=mlp(ffn=1024, activation=relu, bias), "
    "normalise=false, capacity=0.75, balance=aux(0.5)",
}
DEEPSEEK = """
import deepseek
model m = deepseek_v3(layers=4, dense=1, width=2048, heads=16, q_rank=512, kv_rank=256, nope=64,
                      rope_size=32, value=64, ffn=4096, expert_ffn=1024, experts=32, top_k=4,
                      groups=8, top_groups=4, scale=2.5, vocab=50257, context=512, aux=0.1)
"""
QWEN = """
import qwen3_moe
model m = qwen3_moe(layers=4, width=2048, heads=16, kv_heads=4, head_size=96, ffn=768, experts=16,
                    top_k=4, vocab=50257, context=512, aux=0.1)
"""
LIBRARY = {"deepseek": DEEPSEEK, "qwen": QWEN}
Case = tuple[int, int, str]
SHORT: list[tuple[str, Case]] = [
    ("shared", (2, 8, "data = 2; zero = 3; microbatch = 2")),
    ("dropping", (2, 4, "tensor = 2; sequence = on; microbatch = 2")),
    ("grouped", (2, 4, "tensor = 2; sequence = off; microbatch = 2; recompute = full")),
    ("shared", (2, 8, "pipeline = 2; schedule = 1f1b; microbatch = 2; stages = [3, 1]")),
    ("dropping", (2, 4, "context = 2; context_style = gather; microbatch = 2")),
    ("deepseek", (2, 4, "context = 2; context_style = ring; microbatch = 2")),
    ("qwen", (2, 4, "tensor = 2; sequence = on; microbatch = 2")),
]
CASES: list[Case] = [
    (1, 8, "microbatch = 2"),
    (1, 8, "microbatch = 4; recompute = full"),
    *((2, 8, f"data = 2; zero = {z}; microbatch = 2") for z in (0, 1, 3)),
    *(
        (2, 4, f"tensor = 2; sequence = {s}; microbatch = 2; recompute = {r}")
        for s, r in itertools.product(("on", "off"), ("none", "full"))
    ),
    (2, 8, "pipeline = 2; schedule = 1f1b; microbatch = 2; stages = [3, 1]"),
    (2, 8, "pipeline = 2; schedule = gpipe; microbatch = 4; recompute = full"),
    *((2, 4, f"context = 2; context_style = {s}; microbatch = 2") for s in ("ring", "ulysses")),
    (4, 4, "context = 2; tensor = 2; sequence = on; microbatch = 2; recompute = full"),
    (8, 8, "data = 2; pipeline = 2; tensor = 2; zero = 3; microbatch = 2; schedule = 1f1b"),
]


def check(options: str, case: Case) -> None:
    devices, batch, pins = case
    model = LIBRARY[options] if options in LIBRARY else MODEL.format(options=OPTIONS[options])
    session, plan = planned(spec_text(model, devices, batch, pins))
    report, small = verify_plan(session, plan, largest=4)
    assert small.mesh == plan.mesh, "the mesh under test is the plan's"
    stacks = [p for p in session.graph(1).units["layer"].parameters.values() if p.picks]
    assert all(len(p.shape) >= 2 for p in stacks) and len(stacks) >= 3
    if plan.mesh.tensor > 1:
        states = plan.placements["layer"].parameters
        assert any(states[p.path].startswith("split") for p in stacks), "experts are split too"
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]


@pytest.mark.parametrize(
    ("options", "case"), SHORT, ids=lambda c: c if isinstance(c, str) else c[2]
)
def test_gradients(options: str, case: Case) -> None:
    check(options, case)


@pytest.mark.long
@pytest.mark.parametrize("options", (*OPTIONS, *LIBRARY))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[2])
def test_every_mesh(options: str, case: Case) -> None:
    check(options, case)
