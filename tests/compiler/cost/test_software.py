"""What published software keeps in another way than emitted programs do, switch by switch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmspec import dsl
from llmspec.compiler import driver

GPT = """
model m {
    vocab = 1024; context = 1024; width = 4096
    block layer(x) {
        x = x + attention(layernorm(x), heads=32, bias, causal)
        x = x + swiglu(layernorm(x), ffn=8192)
    }
    tokens -> embed -> layer * LAYERS -> layernorm -> unembed
}
cluster c { node = 8 * gpu("a100-80-sxm4") }
train { model = m; cluster = c; dataset = synthetic; batch = 32 sequences; steps = 1
        precision = bf16 }
plan { PLAN; microbatch = 2; recompute = RECOMPUTE }
"""
TOKENS, WIDTH, FFN = 2 * 1024, 4096, 8192
TENSOR = "data = 4; tensor = 2; zero = 1; sequence = on; pipeline = 1"
LAYER = 4 * WIDTH * WIDTH + 3 * WIDTH * FFN


def bytes_of(plan: str, layers: int = 2, again: str = "none", **constants: float) -> dict[str, int]:
    text = GPT.replace("LAYERS", str(layers)).replace("PLAN", plan).replace("RECOMPUTE", again)
    program = dsl.load("t.llmspec", text=text)
    device = program.cluster.device
    device = replace(device, constants={**device.constants, **constants})
    program = replace(program, cluster=replace(program.cluster, device=device))
    return driver.find_plan(driver.Session(program)).plan.predicted["predicted"]["memory_bytes"]


def saved_by(plan: str, again: str = "none", **constants: float) -> int:
    """Bytes of activations that a switch spares one more layer."""

    def layer(**switches: float) -> int:
        few, many = (bytes_of(plan, n, again, **switches) for n in (2, 3))
        return many["activations"] - few["activations"]

    return layer() - layer(**constants)


@pytest.mark.parametrize("again", ["none", "[attention_mixed]"])
def test_what_is_gathered_again_is_kept_in_parts(again: str) -> None:
    """The inputs of attention and of the MLP: half of each, on two ranks."""
    assert saved_by(TENSOR, again, regathers=1.0) == 2 * TOKENS * WIDTH * 2 // 2


def test_a_gate_in_one_kernel_keeps_no_activation() -> None:
    assert saved_by("data = 8; tensor = 1; zero = 1; pipeline = 1", fused_gate=1.0) == (
        2 * TOKENS * FFN
    )


def test_weights_stored_short_are_not_cast_for_each_use() -> None:
    """One copy in the compute type, whatever is in flight; sums in the type of the reduction."""
    plan = "data = 2; tensor = 1; zero = 0; pipeline = 4; schedule = 1f1b"
    few, many = (bytes_of(plan, n, gradient_bytes=6.0) for n in (4, 8))
    stored = {k: many[k] - few[k] for k in ("parameters", "gradients", "optimizer", "buffers")}
    layer = LAYER + 4 * WIDTH + 4 * WIDTH  # norms, and attention's biases
    assert stored == {
        "parameters": 4 * layer,
        "gradients": 4 * layer,
        "optimizer": 8 * layer,
        "buffers": 2 * layer,
    }
    casts = bytes_of(plan, 8)["activations"] - many["activations"]
    assert casts > 3 * 2 * LAYER  # of four micro-batches in flight, on the first stage


def test_spare_gradients_are_one_of_each_shape() -> None:
    """q, k and v are one product, as gate and up are."""
    plan = "data = 8; tensor = 1; zero = 1; pipeline = 1"
    more = [bytes_of(plan, n, spare_gradients=1.0)["gradients"] for n in (2, 4)]
    plain = [bytes_of(plan, n)["gradients"] for n in (2, 4)]
    assert [a - b for a, b in zip(more, plain, strict=True)] == [2 * LAYER] * 2


def test_held_bytes_are_of_the_stage_and_of_the_part() -> None:
    plan = "data = 8; tensor = 1; zero = 1; pipeline = 1"
    plain = bytes_of(plan)
    elements = plain["parameters"] // 4 * 8
    assert bytes_of(plan, held_bytes=2.0)["gradients"] == plain["gradients"] + 2 * elements
    part = bytes_of(plan, part_bytes=6.0)["gradients"] - plain["gradients"]
    assert part == pytest.approx(6 * elements / 8, rel=1e-3)


def test_a_loss_that_overwrites_its_logits_needs_no_second_ones(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Narrow, so that the weight's gradient, a moment later, takes less than logits do."""
    narrow = GPT.replace("vocab = 1024", "vocab = 65536").replace("width = 4096", "width = 256")
    monkeypatch.setattr(f"{__name__}.GPT", narrow)
    plan = "data = 8; tensor = 1; zero = 1; pipeline = 1"
    plain = bytes_of(plan, whole_logits=1.0)
    fused = bytes_of(plan, whole_logits=1.0, fused_loss=1.0)
    assert sum(plain.values()) - sum(fused.values()) >= 2 * TOKENS * 65536
