"""Emitted pipelines compute, send, gather and sum in the order that plan.json says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmspec.compiler.driver import compile_plan
from llmspec.compiler.orders import Schedule
from llmspec.compiler.verify.run import mesh_sizes
from tests import processes
from tests.compiler.verify.models import planned
from tests.end_to_end.executed import Done, executed

MODEL = """
model m {
    vocab = 64; context = 16; width = 32
    block layer(x) {
        x = x + attention(rmsnorm(x), heads=2, causal)
        x = x + mlp(rmsnorm(x), ffn=64)
    }
    tokens -> embed -> layer * 8 -> rmsnorm -> unembed(tied)
}
"""


def compiled(folder: Path, devices: int, microbatches: int, pins: str) -> dict[str, int]:
    data = devices // int(pins.split("pipeline = ")[1][0])
    text = f"""{MODEL}
cluster c {{ node = {devices} * gpu("H200") }}
train t {{
    model = m; cluster = c; dataset = synthetic(); steps = 10
    batch = {microbatches * data} sequences; precision = fp32
}}
plan {{ {pins}; microbatch = 1 }}
"""
    session, plan = planned(text)
    assert plan.microbatches == microbatches
    compile_plan(session, plan, folder)
    return mesh_sizes(plan)


def check(folder: Path, ranks: Sequence[Done]) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    lists, mesh = plan["actions"], plan["mesh"]
    owner = {int(word[0]): rank for rank, words in enumerate(lists) for word in words}
    together = mesh["replicas"] * mesh["shards"] > 1
    for rank, words, sent in ranks:
        # one data rank has nobody to sum with
        planned = [w for w in lists[rank] if together or not w.endswith("REDUCE_GRAD")]
        assert words == planned
        for word, to in sent:
            assert to == owner[int(word[0]) + (1 if "SEND_F" in word else -1)]


def check_all(folder: Path, devices: int, microbatches: int, cases: Sequence[str]) -> None:
    folders = [folder / str(i) for i in range(len(cases))]
    sizes = [compiled(f, devices, microbatches, c) for f, c in zip(folders, cases, strict=True)]
    runs = list(zip(map(str, folders), sizes, strict=True))
    by_rank = processes.run(devices, executed, runs)
    for one, *ranks in zip(folders, *by_rank, strict=True):
        assert len(ranks) == devices
        check(one, ranks)


def every(pipeline: int) -> list[str]:
    """Each schedule with as many stages on a rank as it takes, up to two."""
    return [
        f"pipeline = {pipeline}; schedule = {schedule}; interleave = {each}"
        for schedule in Schedule
        for each in (1, 2)
        if schedule.allows(each)
    ]


def test_every_schedule(tmp_path: Path) -> None:
    check_all(tmp_path, 2, 4, every(2))


def test_with_data_ranks(tmp_path: Path) -> None:
    """When parameters are gathered and released, and after which backwards gradients are summed."""
    cases = [
        "pipeline = 2; schedule = gpipe; data = 2; zero = 0",
        "pipeline = 2; schedule = 1f1b; data = 2; zero = 1",
        "pipeline = 2; schedule = zbv; data = 2; zero = 2",
        "pipeline = 2; schedule = zero_bubble; interleave = 1; data = 2; zero = 3",
    ]
    check_all(tmp_path, 4, 4, cases)


@pytest.mark.long
@pytest.mark.parametrize("microbatches", [3, 4, 8])
def test_four_ranks(tmp_path: Path, microbatches: int) -> None:
    check_all(tmp_path, 4, microbatches, every(4))


@pytest.mark.long
@pytest.mark.parametrize("zero", range(4))
def test_every_schedule_with_data_ranks(tmp_path: Path, zero: int) -> None:
    check_all(tmp_path, 4, 4, [f"{case}; data = 2; zero = {zero}" for case in every(2)])
