"""What a dry run counts, against real processes and against the plan."""

from __future__ import annotations

import pytest
import torch

from llmspec.compiler.dryrun.live import LiveBytes, resizes_seen
from llmspec.compiler.dryrun.run import dry_run
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


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_collectives_are_what_the_plan_says(zero: int) -> None:
    pins = f"data = 2; tensor = 2; zero = {zero}; microbatch = 1; recompute = none"
    session, plan = planned(spec_text(MODEL, 4, 8, pins))
    (role,) = dry_run(session, plan)
    listed = plan.predicted["predicted"]["collectives"]
    for kind in ("reduce_scatter", "all_gather"):
        executed = sum(s * count for k, _, s, count in role.collectives if k == kind)
        assert executed == sum(c["bytes"] * c["count"] for c in listed if c["kind"] == kind)
