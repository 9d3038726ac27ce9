"""Closed forms of the literature, out of the ledger and the operators' own costs.

B sequences of s tokens in a micro-batch, h width, a heads, l layers, V vocabulary, t tensor ranks.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.build.model import build_model

MODEL = """
model m {{
    vocab = {V}; context = {s}; width = {h}
    block layer(x) {{
        x = x + dropout(attention(layernorm(x), heads={a}, bias, causal{inside}), 0.1)
        x = x + dropout(mlp(layernorm(x), ffn={ffn}, activation=gelu, bias), 0.1)
    }}
    tokens -> embed(positions=learned) -> layer * {l} -> layernorm -> unembed(tied)
}}
cluster c {{ node = {gpus} * gpu("a100-80-sxm4") }}
train {{ model = m; cluster = c; dataset = synthetic; batch = 8 sequences; steps = 1
         precision = bf16 }}
plan {{ data = 2; tensor = {t}; zero = 1; pipeline = 1; microbatch = {B}; recompute = {recompute}
        {sequence} }}
"""
B = 2


def spec(
    *,
    layers: int = 2,
    s: int,
    h: int,
    a: int,
    V: int = 1024,
    t: int = 1,
    sequence: str = "",
    recompute: str = "none",
    inside: str = "",
    **software: float,
):
    """`inside`: of attention. `software`: constants of cost/hardware.py."""
    text = MODEL.format(
        **{"V": V, "s": s, "h": h, "a": a, "t": t, "B": B, "l": layers, "ffn": 4 * h},
        gpus=2 * t,
        recompute=recompute,
        inside=f", {inside}" if inside else "",
        sequence=f"sequence = {sequence}" if sequence else "",
    )
    program = dsl.load("t.llmspec", text=text)
    device = program.cluster.device
    device = replace(device, constants={**device.constants, **software})
    return replace(program, cluster=replace(program.cluster, device=device))


def predicted(**sizes):
    return driver.find_plan(driver.Session(spec(**sizes))).plan.predicted["predicted"]


def layer_bytes(**sizes) -> float:
    """What autograd keeps of one more layer, over s·B·h."""
    less, more = (predicted(layers=n, **sizes)["memory_bytes"]["activations"] for n in (2, 3))
    return (more - less) / (sizes["s"] * B * sizes["h"])


@pytest.mark.parametrize(("h", "layers", "vocab"), [(64, 2, 512), (64, 5, 50304), (128, 2, 50304)])
def test_parameters_of_a_gpt(h, layers, vocab):
    """hV + l(12h² + 13h) + 2h, and sh of learned positions (Narayanan et al. 2021)."""
    s = 64
    graph = build_model(spec(layers=layers, s=s, h=h, a=4, V=vocab).model, sequences=1, tokens=s)
    expected = h * vocab + layers * (12 * h * h + 13 * h) + 2 * h + s * h
    assert sum(math.prod(p.shape) for _, p in graph.parameters() if p.tied is None) == expected


@pytest.mark.parametrize(
    ("s", "h", "layers", "vocab"),
    [(256, 512, 2, 1024), (512, 512, 4, 1024), (256, 1024, 2, 8192), (512, 1024, 4, 8192)],
)
def test_operations_of_a_step_that_runs_all_again(s, h, layers, vocab):
    """96Bslh²(1 + s/6h + V/16lh), the whole square of attention counted (Narayanan et al. 2021)."""
    sizes = {"layers": layers, "s": s, "h": h, "a": 8, "V": vocab}
    made = predicted(recompute="full", inside="explicit", **sizes)
    executed = made["hardware_flops_per_s_per_gpu"] * made["step_time_s"] * 2
    form = 96 * 8 * s * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
    assert executed == pytest.approx(form, rel=1e-6)


@pytest.mark.parametrize(
    ("h", "a", "layers", "added"),
    [(6144, 64, 48, 1.7), (12288, 96, 96, 0.9), (20480, 128, 105, 0.55), (25600, 160, 128, 0.44)],
)
def test_operations_of_running_attention_again(h, a, layers, added):
    """Percent of a step's (Korthikanti et al. 2022, 5): of 22, 175, 530 and 1000 billion
    parameters, by two blocks and the share of the whole's logits."""
    s, V = 2048, 51200
    none, inside = (
        predicted(layers=2, s=s, h=h, a=a, t=8, recompute=r, inside="explicit")
        for r in ("none", "[attention_mixed]")
    )
    executed = [
        m["hardware_flops_per_s_per_gpu"] * m["step_time_s"] * 16 / 8 for m in (none, inside)
    ]
    whole = 72 * s * layers * h**2 * (1 + s / (6 * h) + V / (12 * layers * h))
    share = (executed[1] - executed[0]) / 2 * layers / whole
    assert 100 * share == pytest.approx(added, abs=0.06)


INSIDE = ("attention_scores", "attention_weights", "attention_dropped", "attention_mixed")
"""What Korthikanti et al. run again: q kᵀ, softmax, its dropout, the weights' product with v."""
AGAIN = f"[{', '.join(INSIDE)}]"
DROPPED = "dropout=0.1"
SHAPES = [(256, 512, 4), (512, 512, 8), (256, 1024, 16)]


@pytest.mark.parametrize(("s", "h", "a"), SHAPES)
class TestActivations:
    """Bytes a layer over sBh (Korthikanti et al. 2022, table 2). Beside the paper's terms: 4
    numbers of layer norms' statistics a token, and one of fused attention a head."""

    def test_nothing_again(self, s, h, a):
        """34 + 5as/h: of the square the weights, their mask, and what is left of them."""
        expected = 34 + 5 * a * s / h + 16 / h
        assert layer_bytes(s=s, h=h, a=a, inside=DROPPED) == pytest.approx(expected, abs=1e-3)

    def test_of_the_square_without_dropout_the_weights_alone(self, s, h, a):
        expected = 34 + 2 * a * s / h + 16 / h
        assert layer_bytes(s=s, h=h, a=a, inside="explicit") == pytest.approx(expected, abs=1e-3)

    def test_no_square(self, s, h, a):
        assert layer_bytes(s=s, h=h, a=a) == pytest.approx(34 + 16 / h + 4 * a / h, abs=1e-3)

    def test_everything_again(self, s, h, a):
        assert layer_bytes(s=s, h=h, a=a, recompute="full", inside=DROPPED) == pytest.approx(2)

    def test_the_inside_of_attention_again(self, s, h, a):
        """34, with the result of attention, which is an operand of the projection behind it; 32
        where it comes back with the rest."""
        kept = [
            layer_bytes(s=s, h=h, a=a, inside=DROPPED, recompute=f"[{', '.join(again)}]")
            for again in (INSIDE[:-1], INSIDE)
        ]
        assert kept == pytest.approx([34 + 16 / h, 32 + 16 / h], abs=1e-3)


SIZE = {"s": 1024, "h": 4096, "a": 32}
"""At which no other placement is faster than the papers'."""


@pytest.mark.parametrize("t", [2, 4])
@pytest.mark.parametrize(
    ("sequence", "recompute", "form"),
    [
        ("on", "none", lambda t, square: (34 + square) / t),
        ("on", f"[{', '.join(INSIDE[:-1])}]", lambda t, square: 34 / t),
        ("on", "full", lambda t, square: 2 / t),
        ("off", "full", lambda t, square: 2.0),
    ],
)
def test_activations_of_tensor_and_sequence_ranks(t, sequence, recompute, form):
    """Table 2 of Korthikanti et al. 2022, whose sequence ranks gather again in the backward; of
    norms' statistics a few bytes more."""
    sizes = {"t": t, "sequence": sequence, "recompute": recompute, "inside": DROPPED}
    software = {"regathers": 1.0} if sequence == "on" else {}
    kept = layer_bytes(**SIZE, **sizes, **software)
    statistics = 0 if recompute == "full" else 16 / 4096 / (t if sequence == "on" else 1)
    expected = form(t, 5 * 32 * 1024 / 4096) + statistics
    assert kept == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("t", [2, 4])
def test_activations_of_tensor_ranks(t):
    """10 + 24/t, with no square: written out, another placement of attention is faster here."""
    kept = layer_bytes(**SIZE, t=t, sequence="off")
    assert kept == pytest.approx(10 + 24 / t + 16 / 4096 + 4 * 32 / 4096 / t, abs=1e-3)


def test_what_sequence_ranks_gather_is_kept_whole_by_emitted_programs():
    """34/t, but for the two inputs that products gather."""
    kept = layer_bytes(**SIZE, t=2, sequence="on")
    assert kept == pytest.approx(34 / 2 + 4 / 2 + 16 / 4096 / 2 + 4 * 32 / 4096 / 2, abs=1e-3)
