"""Every gradient of programs with context ranks, on real processes, against one device."""

from __future__ import annotations

from itertools import product

import pytest

from llmspec.compiler.ops.context_attention import STYLES
from llmspec.compiler.verify.plan import verify_plan
from tests.compiler.verify.models import GPT, LLAMA, planned, spec_text


def _grouped(options: str) -> str:
    """32 query heads, 8 key/value heads; more context ranks than a shrunken model has of these."""
    return f"""
model m {{
    vocab = 50257; context = 512; width = 4096
    block layer(x) {{
        x = x + attention(rmsnorm(x), heads=32, kv_heads=2, {options})
        x = x + swiglu(rmsnorm(x), ffn=14336)
    }}
    tokens -> embed(positions=learned) -> layer * 8 -> rmsnorm -> unembed
}}
"""


MODELS = {
    "gpt": GPT,
    "llama": LLAMA,
    "window": _grouped("causal, window=100, rope=10_000"),
    "both ways": _grouped("bias"),
    "explicit": _grouped("causal, explicit"),
    "one head": LLAMA.replace("kv_heads=8", "kv_heads=1"),
}

Case = tuple[int, int, str]
"""Devices, sequences per step, pins."""

ALONE: list[Case] = [
    (n, 4, f"context = {n}; context_style = {style}; microbatch = 2")
    for n, style in product((2, 4), STYLES)
]

COMBINED: list[Case] = [
    *(
        (4, 4, f"context = 2; tensor = 2; sequence = {s}; context_style = {style}; microbatch = 2")
        for s, style in product(("on", "off"), STYLES)
    ),
    (8, 4, "context = 4; tensor = 2; sequence = on; context_style = ring; microbatch = 2"),
    *((4, 8, f"context = 2; data = 2; zero = {z}; shard = {s}; microbatch = 2")
      for z, s in ((0, 1), (1, 4), (2, 4), (3, 4), (1, 2), (3, 2))),
    (2, 4, "context = 2; zero = 3; microbatch = 2"),
    (8, 8, "context = 2; data = 4; zero = 2; shard = 4; microbatch = 1"),
    (8, 8, "context = 2; data = 2; tensor = 2; zero = 3; shard = 2; microbatch = 2"),
    (4, 8, "context = 2; pipeline = 2; schedule = 1f1b; microbatch = 2; stages = [3, 5]"),
    (4, 8, "context = 2; pipeline = 2; schedule = gpipe; microbatch = 4; recompute = full"),
    (4, 8, "context = 2; pipeline = 2; context_style = ulysses; microbatch = 2; zero = 3"),
    (8, 8, "context = 2; pipeline = 2; tensor = 2; context_style = ring; microbatch = 2"),
    (8, 8, "context = 2; pipeline = 2; data = 2; zero = 2; microbatch = 1"),
    *((2, 4, f"context = 2; context_style = {style}; microbatch = 2; recompute = full")
      for style in STYLES),
]  # fmt: skip

FAST = {
    ("gpt", ALONE[0]),
    ("llama", ALONE[1]),
    ("llama", ALONE[5]),
    ("window", ALONE[0]),
    ("llama", COMBINED[0]),
    ("gpt", COMBINED[12]),
}
"""The rest are many, and run with the long tests."""


def _cases() -> list:  # type: ignore[type-arg]
    found = [(m, c) for m, c in product(MODELS, ALONE)]
    found += [(m, c) for m, c in product(("gpt", "llama"), COMBINED)]
    return [
        pytest.param(m, c, id=f"{m}-{c[2]}", marks=() if (m, c) in FAST else pytest.mark.long)
        for m, c in found
    ]


@pytest.mark.parametrize(("model", "case"), _cases())
def test_gradients(model: str, case: Case) -> None:
    devices, batch, pins = case
    session, plan = planned(spec_text(MODELS[model], devices, batch, pins))
    report, small = verify_plan(session, plan, largest=4)
    assert small.mesh == plan.mesh, "the mesh under test is the plan's"
    assert plan.mesh.context > 1
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]
