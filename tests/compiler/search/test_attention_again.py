"""What is worth computing again in the models of Korthikanti et al. 2022, on the meshes of their
table 3: with attention written out and dropout on its weights, its inner tensors; with flash
attention something else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest

from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.cost.recompute import Again
from llmspec.compiler.cost.unit import UnitCost
from llmspec.compiler.forecast import Priced, priced
from llmspec.compiler.plan import EVERYTHING
from llmspec.compiler.search.search import Found

MODEL = """
model m {{
    vocab = 51200; context = 2048; width = {h}
    block layer(x) {{
        x = x + dropout(attention(layernorm(x), heads={a}, bias, causal{inside}), 0.1)
        x = x + dropout(mlp(layernorm(x), activation=gelu, bias), 0.1)
    }}
    tokens -> embed(positions=learned) -> dropout(0.1) -> layer * {layers} -> layernorm
           -> unembed(tied)
}}
cluster c {{ node = 8 * gpu("a100-80-sxm4"); nodes = {p} }}
train {{ model = m; cluster = c; dataset = synthetic; batch = {batch} sequences; steps = 1
         precision = fp16(reduce=fp16) }}
plan {{ data = 1; tensor = 8; sequence = on; pipeline = {p}; zero = 0; microbatch = {b}
        recompute = {recompute}; offload = none{schedule} }}
"""
INNER = ("attention_scores", "attention_weights", "attention_dropped", "attention_mixed")

Model = tuple[int, int, int, int, int, int]
"""Width, heads, layers, pipeline ranks, micro-batch, batch."""
MODELS: dict[str, tuple[Model, float, float]] = {
    "22B": ((6144, 64, 48, 1, 4, 4), 76, 1.7),
    "175B": ((12288, 96, 96, 8, 1, 64), 70, 0.9),
    "530B": ((20480, 128, 105, 35, 1, 280), 65, 0.55),
    "1T": ((25600, 160, 128, 64, 1, 512), 65, 0.44),
}
NAMES = ["22B", "175B", *(pytest.param(n, marks=pytest.mark.long) for n in ("530B", "1T"))]


def session(name: str, inside: str, recompute: str, *, bounded: bool) -> driver.Session:
    (h, a, layers, p, b, batch), *_ = MODELS[name]
    sizes = {"h": h, "a": a, "layers": layers, "p": p, "b": b, "batch": batch}
    schedule = "; schedule = 1f1b" if p > 1 else ""
    text = MODEL.format(**sizes, inside=inside, recompute=recompute, schedule=schedule)
    program = dsl.load(f"{name}.llmspec", text=text)
    if bounded:
        return driver.Session(program)
    # as their software does: what tensor ranks gather for a product is gathered again
    device = program.cluster.device
    device = replace(device, constants={**device.constants, "regathers": 1.0})
    cluster = replace(program.cluster, device=device)
    budget = replace(program.budget, memory_bytes=1 << 60)
    return driver.Session(replace(program, cluster=cluster, budget=budget))


@cache
def known(name: str, inside: str) -> Priced:
    """The published mesh with nothing computed again."""
    found = session(name, inside, "none", bounded=False)
    made = driver.find_plan(found)
    assert isinstance(made, Found)
    return priced(found.program, made.plan, found.graph(made.plan.microbatch))


def worthwhile(of: Priced) -> Sequence[Again]:
    """The search's own sets for one block, from the one that frees least."""
    policies = of.space.chain.policies
    return policies.choices(of.shape.option, of.plan.microbatch, "layer")


def again(of: Priced, operators: tuple[str, ...]) -> Again:
    policies = of.space.chain.policies
    return policies.flow(of.shape.option, of.plan.microbatch, "layer").again(operators)


def block(of: Priced) -> UnitCost:
    return next(run.cost for stage in of.stages for run in stage.runs if run.block)


@pytest.mark.parametrize("name", NAMES)
class TestWrittenOut:
    def test_what_it_frees_and_adds(self, name: str) -> None:
        (h, _, layers, *_), freed, added = MODELS[name]
        of = known(name, ", dropout=0.1")
        nothing, inner = again(of, ()), again(of, INNER)
        # attention's result is an operand of the projection behind it, and comes back with the rest
        result = 2 * of.plan.microbatch * 2048 * h / 8
        share = 1 - (inner.kept_bytes + result) / nothing.kept_bytes
        assert 100 * share == pytest.approx(freed, rel=0.1)
        head = 6 * of.plan.microbatch * 2048 * h * 51200 / 8
        cost = block(of)
        whole = layers * (cost.flops + cost.backward_flops) + head
        assert 100 * layers * inner.flops / whole == pytest.approx(added, rel=0.1)

    def test_the_search_finds_it(self, name: str) -> None:
        """The first operator to run again is one of attention's; of what the first set frees that
        has the whole square, they free four fifths, and no product with a weight runs again."""
        sets = [a for a in worthwhile(known(name, ", dropout=0.1")) if a.operators]
        assert set(sets[0].operators) <= set(INNER)
        square = next(a for a in sets if set(INNER[:3]) <= set(a.operators))
        of = known(name, ", dropout=0.1")
        nothing = again(of, ()).kept_bytes
        inside = again(of, tuple(n for n in square.operators if n in INNER))
        assert nothing - inside.kept_bytes > 0.8 * (nothing - square.kept_bytes)
        products = ("_q_", "_k_", "_v_", "_out_", "_up_", "_down_")
        assert not [n for n in square.operators if any(p in f"{n}_" for p in products)]

    def test_flash_attention_has_something_else(self, name: str) -> None:
        """GELU's result, then what norms give: their inputs are kept anyway."""
        first, second, *_ = (a.operators for a in worthwhile(known(name, "")) if a.operators)
        assert first == ("mlp_hidden",)
        assert second == ("layernorm_normed", "layernorm_2_normed", "mlp_hidden")


def test_a_plan_of_22_billion_parameters() -> None:
    """On 8 GPUs of 80 GB: some blocks compute attention's inside again, the others nothing."""
    made = driver.find_plan(session("22B", ", dropout=0.1", "selective", bounded=True))
    assert isinstance(made, Found)
    stretches = made.plan.recompute["layer"]
    again_of = {name for s in stretches for name in s.again if s.again != EVERYTHING}
    assert again_of
    assert again_of <= set(INNER)
    assert any(not s.again for s in stretches)
