"""What a dry run counts, against real processes and against the plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmspec.compiler.dryrun.live import LiveBytes, resizes_seen
from llmspec.compiler.dryrun.run import Role, dry_run
from llmspec.compiler.passes.shard import whole_placement
from llmspec.compiler.plan import Plan
from llmspec.compiler.views import seen, view_of
from tests.compiler.verify.models import planned, spec_text
from tests.live_bytes import measure

MODEL = """
import llama
model m = llama(layers=2, width=128, heads=4, kv_heads=2, ffn=256, vocab=512, context=128)
"""


def test_each_storage_counts_once_and_until_its_end() -> None:
    with LiveBytes() as live:
        x = torch.zeros(100)
        y = x.view(10, 10).t()
        assert live.now == 400
        z = y + 1
        del x, y
        assert (live.now, live.peak) == (400, 800)
        del z
    assert (live.now, live.peak) == (0, 800)


def test_resized_storages_count_as_they_are() -> None:
    with LiveBytes() as live, resizes_seen(live):
        x = torch.zeros(100)
        x.untyped_storage().resize_(0)
        assert live.now == 0
        x.untyped_storage().resize_(800)
        assert (live.now, live.peak) == (800, 800)


@pytest.mark.parametrize(
    ("devices", "pins"),
    [
        (1, "microbatch = 2; recompute = none"),
        (2, "data = 2; zero = 3; microbatch = 1"),
        (2, "tensor = 2; sequence = on; microbatch = 2"),
        (2, "pipeline = 2; schedule = 1f1b; microbatch = 1"),
    ],
)
def test_live_bytes_are_those_of_real_processes(devices: int, pins: str) -> None:
    session, plan = planned(spec_text(MODEL, devices, 4, pins))
    across = plan.mesh.world_size // plan.mesh.pipeline
    # real messages to the next stage live until they have arrived
    on_their_way = 2 * 4 * plan.microbatch * 128 * 128 if plan.mesh.pipeline > 1 else 0
    for role, real in zip(dry_run(session, plan), measure(session, plan)[::across], strict=True):
        assert abs(role.peak_bytes - real.peak) <= 0.01 * real.peak + on_their_way
        assert role.resting_bytes == pytest.approx(real.resting, rel=0.01)


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.long)])
def test_the_loss_makes_no_whole_logits(tensor: int) -> None:
    """They alone would be more than everything that is ever alive; and where the plan has them
    whole, they are there."""
    model = MODEL.replace("vocab=512, context=128", "vocab=65536, context=512")
    session, plan = planned(spec_text(model, tensor, 16, f"tensor = {tensor}; microbatch = 16"))
    logits = 4 * 16 * 512 * 65536 // tensor
    assert plan.loss_rows is not None and 2 * plan.loss_rows < 16 * 512
    (joined,) = dry_run(session, plan)
    assert joined.peak_bytes < 0.9 * logits
    if tensor == 1:  # where there is nothing to place
        apart = replace(plan, loss_rows=None)
        units = seen(session.graph(plan.microbatch), view_of(apart)).units
        placements = {name: whole_placement(unit) for name, unit in units.items()}
        (whole,) = dry_run(session, replace(apart, placements=placements))
        assert whole.peak_bytes > 2 * logits


def unexplained(role: Role, plan: Plan) -> list[tuple[str, int, int, int, int]]:
    """Collectives that differ, but for small ones that the plan does not price: what the loss of a
    split vocabulary sends (numbers of each token), how many rows go to each expert."""
    small = 4 * 2 * plan.microbatch * 128
    statistics = {("all_reduce", plan.mesh.tensor), ("all_to_all", plan.mesh.expert)}
    statistics |= {("all_reduce", plan.mesh.data * plan.mesh.context)}
    return [
        one
        for one in role.differing
        if not (one[:2] in statistics and one[2] <= small and one[3] == 0)
    ]


@pytest.mark.parametrize("zero", [0, 3])
def test_collectives_are_what_the_plan_says(zero: int) -> None:
    pins = f"data = 2; tensor = 2; zero = {zero}; microbatch = 1; recompute = none"
    session, plan = planned(spec_text(MODEL, 4, 8, pins))
    (role,) = dry_run(session, plan)
    assert role.predicted_collectives and not unexplained(role, plan)


EVERY = (
    "data = 2; zero = 0; microbatch = 2@2",
    "data = 4; zero = 1; microbatch = 1@4",
    "data = 4; shard = 2; zero = 1; microbatch = 1@4",
    "data = 4; shard = 2; zero = 2; microbatch = 1@4",
    "data = 4; shard = 2; zero = 3; microbatch = 1; recompute = full@4",
    "tensor = 2; sequence = off; microbatch = 2@2",
    "tensor = 4; sequence = on; microbatch = 2; recompute = full@4",
    "data = 2; tensor = 2; sequence = on; zero = 1; microbatch = 1@4",
    "context = 2; context_style = ring; zero = 0; microbatch = 2@2",
    "context = 2; context_style = ulysses; zero = 2; microbatch = 2@2",
    "context = 2; context_style = gather; zero = 3; microbatch = 2@2",
    "offload = optimizer; data = 2; zero = 2; microbatch = 2@2",
    "offload = activations; data = 2; zero = 3; microbatch = 2@2",
    "pipeline = 2; schedule = gpipe; microbatch = 1@2",
    "pipeline = 2; data = 2; zero = 0; schedule = 1f1b; microbatch = 1@4",
    "pipeline = 2; data = 2; zero = 2; schedule = interleaved; interleave = 2; microbatch = 1@4",
    "pipeline = 2; data = 2; zero = 1; schedule = zero_bubble; microbatch = 1@4",
    "pipeline = 2; data = 4; shard = 2; zero = 3; schedule = zero_bubble; microbatch = 1@8",
    "pipeline = 2; tensor = 2; schedule = zbv; microbatch = 1@4",
    "pipeline = 2; data = 2; zero = 3; schedule = dualpipev; microbatch = 1@4",
)


MIXTURE = """
model m {
    vocab = 512; context = 128; width = 128
    block layer(x) {
        x = x + attention(rmsnorm(x), heads=4, rope=10_000, causal)
        x = x + moe(rmsnorm(x), experts=4, top_k=2, expert=swiglu(ffn=128))
    }
    tokens -> embed -> layer * 4 -> rmsnorm -> unembed(tied)
}
"""
EXPERTS = (
    "microbatch = 2@1",
    "data = 2; expert = 2; zero = 3; microbatch = 1@2",
    "data = 4; expert = 2; zero = 1; microbatch = 1@4",
    "data = 4; expert = 2; zero = 0; microbatch = 1@4",
    "pipeline = 2; schedule = 1f1b; microbatch = 1@2",
)


@pytest.mark.long
@pytest.mark.parametrize("case", [*EVERY, *(f"experts; {case}" for case in EXPERTS)])
def test_collectives_under_every_key(case: str) -> None:
    pins, _, devices = case.removeprefix("experts; ").partition("@")
    dense = MODEL.replace("layers=2", "layers=4")
    model = MIXTURE if case.startswith("experts") else dense
    session, plan = planned(spec_text(model, int(devices), 8, pins, "bf16"))
    for role in dry_run(session, plan):
        assert not unexplained(role, plan), role.pipeline_rank
