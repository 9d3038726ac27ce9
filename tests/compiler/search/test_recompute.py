"""What to compute again in one block: integer programs against enumeration."""

from __future__ import annotations

import itertools
from functools import cache

import pytest

from llmspec import dsl
from llmspec.compiler.cost.recompute import EVERYTHING, Flow, flow_of
from llmspec.compiler.driver import Session
from llmspec.compiler.passes.shard import shard_unit
from llmspec.compiler.search.meshes import Grid
from llmspec.compiler.search.recompute import Program, corners
from llmspec.compiler.search.space import Space
from tests.compiler.verify.models import GPT, LLAMA, spec_text

SMALL = """
model m {
    vocab = 64; context = 64; width = 32
    block layer(x) { x = x + dropout(mlp(layernorm(x), ffn=64, activation=relu), 0.1) }
    tokens -> embed -> layer * 2 -> unembed
}
"""
GATED = SMALL.replace(
    "dropout(mlp(layernorm(x), ffn=64, activation=relu), 0.1)", "swiglu(rmsnorm(x), ffn=96)"
)
ATTENDING = SMALL.replace(
    "dropout(mlp(layernorm(x), ffn=64, activation=relu), 0.1)",
    "attention(rmsnorm(x), heads=4, causal, explicit)",
)
OLD = GPT.replace("heads=32", "heads=32, explicit").replace("context = 512", "context = 2048")
MODELS = {"mlp": SMALL, "swiglu": GATED, "attention": ATTENDING, "gpt": GPT, "llama": LLAMA}


@cache
def flows(model: str, ranks: int, microbatch: int = 2) -> tuple[Flow, ...]:
    """Of the block, one for each placement on the tensor ranks."""
    session = Session(dsl.load("test.llmspec", text=spec_text(model, 8, 64, "", "bf16")))
    space = Space.of(session.program, session.graph)
    found = []
    for view in space.views(Grid(tensor=ranks, pipeline=1, data=8 // ranks)):
        for option in space.tensor_options(ranks, microbatch, view):
            unit = space.graph(microbatch, view).units["layer"]
            lowered = shard_unit(unit, option.placements["layer"], ranks)
            width = space.types.compute
            found.append(flow_of(lowered, option.where, space.machine, width, option.inner))
    return tuple(found)


def sets(flow: Flow):
    names = [s.name for s in flow.candidates()]
    for count in range(len(names) + 1):
        yield from itertools.combinations(names, count)


@pytest.mark.parametrize("name", ["mlp", "swiglu", "attention"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_corner_is_the_best_at_its_price(name, ranks):
    for flow in flows(MODELS[name], ranks):
        program = Program(flow)
        every = {o: flow.again(o) for o in sets(flow)}
        found = [flow.again(o) for o in corners(flow)]
        prices = [1e-12]
        for a, b in itertools.pairwise(found):
            assert a.kept_bytes > b.kept_bytes and a.whole_s < b.whole_s
            prices.append((b.whole_s - a.whole_s) / (a.kept_bytes - b.kept_bytes))
        assert prices == sorted(prices), "the corners are convex"
        for price in (*prices, *(1.5 * p for p in prices)):
            least = min(a.whole_s + price * a.kept_bytes for a in every.values())
            chosen = flow.again(program.solve(price))
            assert chosen.whole_s + price * chosen.kept_bytes == pytest.approx(least, rel=1e-9)
            assert least == pytest.approx(
                min(a.whole_s + price * a.kept_bytes for a in found), rel=1e-9
            )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_ends_are_nothing_and_the_input_alone(name, ranks):
    for flow in flows(MODELS[name], ranks):
        first, *_, last = (flow.again(o) for o in corners(flow))
        whole = flow.again(EVERYTHING)
        assert first.operators == () and first.whole_s == 0 and first.working_bytes == 0
        assert last.kept_bytes == whole.kept_bytes == sum(flow.inputs.values())
        assert last.whole_s <= whole.whole_s * (1 + 1e-12)


def test_old_attention_gives_up_its_square_before_products_of_weights():
    """Korthikanti et al. 2022: with the square written out, attention's inside is what to compute
    again."""
    for flow in (*flows(OLD, 1), *flows(OLD, 4)):
        early = next(c for c in corners(flow) if "attention_mixed" in c)
        products = {s.name for s in flow.steps.values() if s.flops} - {"attention_mixed"}
        assert not products & set(early)
        freed = flow.again(()).kept_bytes - flow.again(early).kept_bytes
        assert freed > 0.5 * flow.again(()).kept_bytes


def test_new_attention_gives_up_cheap_values_first():
    for flow in flows(LLAMA, 1):
        second = corners(flow)[1]
        products = {s.name for s in flow.steps.values() if s.flops}
        assert second and not products & set(second)
