"""The ledger item by item: nothing is left over, and what operators keep is what a block keeps."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmspec.compiler.forecast import Priced, priced
from llmspec.compiler.ledger.items import OTHER, accounts, memory_object, uses_of
from llmspec.compiler.ledger.operators import kept_by_operators
from llmspec.compiler.ledger.shares import from_the_end, shared_out
from llmspec.compiler.ledger.words import render_memory
from tests.compiler.verify.models import planned, spec_text
from tests.conftest import Golden

ROOT = Path(__file__).parents[3]

DENSE = """
import llama
model m = llama(layers=4, width=64, heads=4, kv_heads=2, ffn=128, vocab=256, context=64)
"""
MIXTURE = """
model m {
    vocab = 64; context = 16; width = 32
    block layer(x) {
        x = x + attention(rmsnorm(x), heads=4, rope=10_000, causal)
        x = x + moe(rmsnorm(x), experts=4, top_k=2, expert=swiglu(ffn=32))
    }
    tokens -> embed -> layer * 4 -> rmsnorm -> unembed(tied)
}
"""
QUICK = {
    "microbatch = 8; recompute = none": (DENSE, 1, "bf16"),
    "data = 2; zero = 3; microbatch = 1; recompute = full": (DENSE, 2, "bf16"),
    "pipeline = 4; schedule = 1f1b; microbatch = 1; recompute = none": (DENSE, 4, "bf16"),
    "pipeline = 2; schedule = zbv; microbatch = 1": (MIXTURE, 2, "fp32"),
    "microbatch = 8; recompute = none; kernels = triton": (DENSE, 1, "bf16"),
}
MORE = {
    "data = 2; zero = 3; microbatch = 4; recompute = full; kernels = triton": (DENSE, 2, "bf16"),
    "tensor = 2; microbatch = 4; recompute = none; kernels = inductor": (DENSE, 2, "bf16"),
    "microbatch = 4; kernels = triton": (MIXTURE, 1, "fp32"),
    "microbatch = 2; data = 1": (DENSE, 1, "fp32"),
    "data = 2; zero = 0; microbatch = 2; recompute = [rmsnorm, swiglu]": (DENSE, 2, "bf16"),
    "data = 4; zero = 1; microbatch = 1": (DENSE, 4, "bf16"),
    "data = 2; tensor = 2; zero = 2; sequence = on; microbatch = 1": (DENSE, 4, "bf16"),
    "context = 2; context_style = ring; zero = 0; microbatch = 2": (DENSE, 2, "bf16"),
    "data = 2; expert = 2; zero = 3; microbatch = 1": (MIXTURE, 2, "bf16"),
    "data = 4; expert = 2; zero = 1; microbatch = 1": (MIXTURE, 4, "bf16"),
    "offload = optimizer; microbatch = 2": (DENSE, 1, "bf16"),
    "offload = activations; microbatch = 2; data = 1": (DENSE, 1, "bf16"),
    "offload = parameters; data = 2; zero = 3; microbatch = 1": (DENSE, 2, "bf16"),
    "offload = [activations, parameters]; data = 2; zero = 3; microbatch = 1": (DENSE, 2, "bf16"),
    "offload = activations; pipeline = 2; schedule = 1f1b; microbatch = 1": (DENSE, 2, "bf16"),
    "pipeline = 2; schedule = gpipe; microbatch = 1; recompute = full": (DENSE, 2, "bf16"),
    "pipeline = 2; schedule = interleaved; interleave = 2; microbatch = 1": (DENSE, 2, "bf16"),
    "pipeline = 2; schedule = zero_bubble; microbatch = 1; recompute = full": (DENSE, 2, "bf16"),
    "pipeline = 2; data = 2; zero = 2; schedule = dualpipev; microbatch = 1": (DENSE, 4, "bf16"),
}


def known_plan(pins: str, case: tuple[str, int, str]) -> tuple[Priced, dict]:
    model, devices, precision = case
    session, plan = planned(spec_text(model, devices, 8, pins, precision))
    known = priced(session.program, plan, session.graph(plan.microbatch))
    return known, plan.predicted["predicted"]


def check(pins: str, case: tuple[str, int, str]) -> None:
    known, predicted = known_plan(pins, case)
    found = accounts(known)
    assert sorted(r for one in found for r in one.ranks) == list(range(known.plan.mesh.pipeline))
    assert max(one.ledger.total for one in found) == predicted["peak_memory_bytes"]
    for one in found:
        by_part: Counter[str] = Counter()
        for item in one.items:
            assert item.size_bytes > 0 and item.what != OTHER, item
            by_part[item.part] += item.size_bytes
        assert by_part == {p: size for p, size in one.ledger.parts().items() if size}
    kept = kept_by_operators(known)
    for rank, holder in enumerate(known.holders()):
        for use in uses_of(known, rank, holder):
            again = use.run.recompute.operators if use.run.recompute else ()
            sizes = {
                sum(k.size_bytes for k in storages)
                for choice, storages in kept[use.unit].items()
                if (choice == again or not isinstance(again, str)) and bool(choice) == bool(again)
            }
            assert use.run.kept_bytes(0, 0) in sizes, use.unit


@pytest.mark.parametrize("pins", QUICK)
def test_items_add_up(pins: str) -> None:
    check(pins, QUICK[pins])


@pytest.mark.long
@pytest.mark.parametrize("pins", MORE)
def test_items_of_every_kind_of_plan_add_up(pins: str) -> None:
    check(pins, MORE[pins])


LLAMA_3_8B = """
import llama
model m = llama(layers=32, width=4096, heads=32, kv_heads=8, ffn=14336, vocab=128_256, context=8192)
"""


def test_what_a_block_of_a_llama_3_8b_keeps_with_kernels_and_without() -> None:
    """The table of docs/kernels.md: MiB by operator, of one sequence of 8,192 tokens."""
    found = []
    for kernels in ("eager", "triton"):
        pins = f"data = 8; zero = 3; microbatch = 1; recompute = none; kernels = {kernels}"
        known, _ = known_plan(pins, (LLAMA_3_8B, 8, "bf16"))
        (kept,) = kept_by_operators(known)["layer"].values()
        by_name = {k.value: k.size_bytes / 2**20 for k in kept if not k.statistics}
        found.append((by_name, sum(k.size_bytes for k in kept) / 2**20))
    (eager, eager_all), (triton, triton_all) = found
    assert eager.keys() - triton.keys() == {"swiglu_gate_2"}, "the silu's result is not kept"
    assert eager["swiglu_gate_2"] == 224
    assert triton == {name: size for name, size in eager.items() if name != "swiglu_gate_2"}
    assert round(eager_all) == 1313 and round(triton_all) == 1089
    page = (ROOT / "docs/kernels.md").read_text()
    assert "| together | 1,313 | 1,089 |" in page


@given(st.integers(0, 10**12), st.lists(st.integers(0, 10**9), min_size=1, max_size=9))
def test_shares_sum_to_the_whole(whole: int, sizes: list[int]) -> None:
    assert sum(shared_out(whole, sizes)) == whole
    assert sum(from_the_end(whole, sizes)) == whole
    for share, size in zip(shared_out(whole, sizes)[:-1], sizes, strict=False):
        assert abs(share - (whole * size / sum(sizes) if sum(sizes) else 0)) <= len(sizes) + 1e-3


def test_in_words(golden: Golden) -> None:
    pins = "pipeline = 2; schedule = 1f1b; microbatch = 1; recompute = none"
    known, _ = known_plan(pins, (DENSE, 2, "bf16"))
    golden.check("cli/memory.txt", render_memory(memory_object(known)) + "\n")


def test_what_is_computed_again_has_the_names_of_the_spec() -> None:
    known, _ = known_plan("data = 2; microbatch = 1; recompute = [rmsnorm]", (DENSE, 2, "bf16"))
    (layer,) = (u for u in memory_object(known)["units"] if u["unit"] == "layer")
    assert layer["again"] == ["rmsnorm_normed", "rmsnorm_2_normed"]
    assert layer["words"] == ["rmsnorm", "rmsnorm_2"]
    assert "  layer, computing rmsnorm, rmsnorm_2 again: " in render_memory(memory_object(known))
