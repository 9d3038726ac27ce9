"""Verification finds what is wrong: programs broken on purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llmspec.compiler.driver import Session, emit_plan
from llmspec.compiler.emit.package import write
from llmspec.compiler.verify.run import ProcessFailed, verify_folder
from llmspec.compiler.verify.shrink import shrink
from tests.compiler.verify.models import LLAMA, planned, spec_text

Change = Callable[[dict[str, str]], None]


def edited(file: str, old: str, new: str) -> Change:
    def change(files: dict[str, str]) -> None:
        assert old in files[file], f"{file} has no `{old}`"
        files[file] = files[file].replace(old, new, 1)

    return change


BREAKS = {
    "a gradient that is not summed over tensor ranks": edited("model.py", ", partial=True)", ")"),
    "a sum that is forgotten in the forward": edited(
        "runtime/collectives.py", "return _sum(x, axis) if forward_sums", "return x if forward_sums"
    ),
    "a loss divided by the wrong count": edited(
        "train.py", "part / batch.target_tokens", "part / (batch.target_tokens + 1)"
    ),
    "gradients that are not summed over data ranks": edited(
        "runtime/replicated_data_parallel.py",
        "dist.all_reduce(bucket.reduced, group=group, async_op=True)",
        "dist.all_reduce(bucket.reduced.clone(), group=group, async_op=True)",
    ),
    "a norm with another epsilon": edited("model.py", "eps=1e-05", "eps=1e-03"),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_finds_the_fault(broken: str, tmp_path: Path) -> None:
    pins = "tensor = 2; data = 2; zero = 0; microbatch = 2; sequence = on"
    if "forward" in broken:
        pins = pins.replace("sequence = on", "sequence = off")
    session, plan = planned(spec_text(LLAMA, 4, 4, pins))
    program, small = shrink(session.program, plan)
    little = Session(program)
    files = emit_plan(little, small)
    BREAKS[broken](files)
    write(files, tmp_path)
    try:
        report = verify_folder(str(tmp_path), little.graph(small.microbatch), small, seed=1)
    except ProcessFailed as error:
        pytest.fail(f"the broken program should run: {error}")
    assert not report.ok


def test_another_placement_is_another_plan() -> None:
    text = spec_text(LLAMA, 2, 4, "tensor = 2; microbatch = 2")
    session, plan = planned(text)
    assert replace(plan, zero=1).plan_hash != plan.plan_hash
    assert plan.plan_hash == planned(text)[1].plan_hash
    assert session.program.source_hash == plan.spec_hash
