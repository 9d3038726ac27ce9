"""What a dry run counts, against real processes and against the plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmspec.compiler.cli.running import role_lines
from llmspec.compiler.driver import Session, compile_plan
from llmspec.compiler.dryrun import run
from llmspec.compiler.dryrun.live import LiveBytes, resizes_seen
from llmspec.compiler.dryrun.run import dry_run
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


@pytest.mark.parametrize("zero", [0, 3])
def test_collectives_are_what_the_plan_says(zero: int) -> None:
    pins = f"data = 2; tensor = 2; zero = {zero}; microbatch = 1; recompute = none"
    session, plan = planned(spec_text(MODEL, 4, 8, pins))
    (role,) = dry_run(session, plan)
    assert role.predicted_collectives and not role.differing


def emitted_with(monkeypatch: pytest.MonkeyPatch, line: str, other: str) -> None:
    """Programs have `other` where they had `line`, once."""

    def emit(session: Session, plan: Plan, folder: Path) -> None:
        compile_plan(session, plan, folder)
        text = (folder / "model.py").read_text()
        assert text.count(line) == 1, text
        (folder / "model.py").write_text(text.replace(line, other))

    monkeypatch.setattr(run, "compile_plan", emit)


def test_what_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that sums twice, and holds on to what it needs no more."""
    session, plan = planned(spec_text(MODEL, 2, 8, "tensor = 2; sequence = off; microbatch = 2"))
    twice = "again_BTD = all_reduce(all_reduce(down_BTD, axis=self.tensor), axis=self.tensor)"
    line = "return all_reduce(down_BTD, axis=self.tensor)"
    kept = f"{twice}; self.kept = again_BTD.repeat(1, 64, 1); return again_BTD"
    emitted_with(monkeypatch, line, kept)
    (role,) = dry_run(session, plan)
    (wrong,) = role.differing
    # of two blocks in four micro-batches
    assert (wrong.kind, wrong.ranks) == ("all_reduce", 2)
    assert wrong.executed - wrong.planned == 2 * 4
    assert any(twice in place for place in wrong.places) and "layer" in wrong.units
    assert not role.agrees and role.error < -0.01
    assert role.at_peak[0].operator == "aten.repeat.default" and twice in role.at_peak[0].place
    text = "\n".join(role_lines(role))
    assert f"`{kept}` (model.py:" in text and "and `layer`" in text
    assert "differs: the peak" in text and "aten.repeat.default" in text


FOLDED = ("pipeline = 2; schedule = interleaved; interleave = 2", 2)
FOLDED_LONG = [
    ("recompute = none", 1),
    ("pipeline = 2; schedule = gpipe", 2),
    ("data = 2; zero = 2", 2),
    ("pipeline = 2; schedule = 1f1b; data = 2; zero = 3; recompute = full", 4),
    ("pipeline = 4; schedule = 1f1b; tensor = 2", 8),
    ("pipeline = 2; schedule = zero_bubble", 2),
    ("pipeline = 2; schedule = zero_bubble; data = 2; zero = 2", 4),
    ("pipeline = 2; schedule = interleaved; interleave = 2; data = 2; zero = 1", 4),
    ("pipeline = 2; schedule = zbv", 2),
    ("pipeline = 2; schedule = zbv; data = 2; zero = 2", 4),
    ("pipeline = 2; schedule = dualpipev", 2),
    ("pipeline = 4; schedule = dualpipev; data = 2; zero = 3", 8),
]


@pytest.mark.parametrize(
    ("pins", "devices"),
    [FOLDED, *(pytest.param(*case, marks=pytest.mark.long) for case in FOLDED_LONG)],
)
def test_what_is_counted_is_what_would_have_run(pins: str, devices: int) -> None:
    model = MODEL.replace("layers=2", "layers=8")
    session, plan = planned(spec_text(model, devices, 24, f"{pins}; microbatch = 1", "bf16"))
    for short, whole in zip(
        dry_run(session, plan), dry_run(session, plan, whole=True), strict=True
    ):
        assert short.counted > 0 == whole.counted
        for name in ("peak_bytes", "peak_at", "resting_bytes", "collectives"):
            assert getattr(short, name) == getattr(whole, name), (name, short.pipeline_rank)


EVERY = (
    "data = 2; zero = 0; microbatch = 2@2",
    "data = 4; zero = 1; microbatch = 1@4",
    "data = 4; shard = 2; zero = 1; microbatch = 1@4",
    "data = 4; shard = 2; zero = 2; microbatch = 1@4",
    "data = 4; shard = 2; zero = 3; microbatch = 1; recompute = full@4",
    "tensor = 2; sequence = off; microbatch = 2@2",
    "tensor = 2; sequence = on; microbatch = 2; recompute = full@2",
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
        assert not role.differing, role.pipeline_rank
