"""float32 within its own tolerance; bf16 no worse than one device in bf16."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmspec.compiler.driver import Session, compile_plan
from llmspec.compiler.plan import MeshSizes
from llmspec.compiler.verify.compare import FLOAT32
from llmspec.compiler.verify.half import error_ratios
from llmspec.compiler.verify.run import verify_folder
from llmspec.compiler.verify.shrink import shrink
from tests.compiler.verify.models import MODELS, planned, spec_text

CASES = [
    (2, 8, "data = 2; zero = 0; microbatch = 2"),
    (2, 8, "data = 2; zero = 3; microbatch = 2; recompute = full"),
    (2, 4, "tensor = 2; sequence = on; microbatch = 2"),
    (2, 4, "tensor = 2; sequence = off; microbatch = 2"),
    (2, 8, "pipeline = 2; schedule = 1f1b; microbatch = 2"),
    (8, 8, "data = 2; pipeline = 2; tensor = 2; zero = 2; microbatch = 1; schedule = 1f1b"),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[2])
def test_float32(model: str, case: tuple[int, int, str], tmp_path: Path) -> None:
    devices, batch, pins = case
    session, plan = planned(spec_text(MODELS[model], devices, batch, pins))
    program, small = shrink(session.program, plan)
    little = Session(program)
    compile_plan(little, small, tmp_path)
    report = verify_folder(
        str(tmp_path),
        little.graph(small.microbatch),
        small,
        seed=program.train.seed,
        dtype=torch.float32,
        tolerance=FLOAT32,
    )
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[2])
def test_bf16(model: str, case: tuple[int, int, str], tmp_path: Path) -> None:
    devices, batch, pins = case
    session, plan = planned(spec_text(MODELS[model], devices, batch, pins, precision="bf16"))
    program, small = shrink(session.program, plan)
    little = Session(program)
    compile_plan(little, small, tmp_path / "sharded")
    blocks = small.stages[-1][1]
    rows = program.train.batch_sequences
    single = planned(
        spec_text(MODELS[model], 1, rows, f"microbatch = {small.microbatch}", precision="bf16")
    )[1]
    alone = replace(
        single,
        mesh=MeshSizes(),
        stages=((0, blocks),),
        microbatch=small.microbatch,
        microbatches=rows // small.microbatch,
    )
    compile_plan(little, alone, tmp_path / "single")
    ratios = error_ratios(
        (str(tmp_path / "sharded"), small),
        (str(tmp_path / "single"), alone),
        little.graph(small.microbatch),
        program.train.seed,
    )
    worst = max(ratios.by_name, key=lambda n: ratios.by_name[n])
    assert ratios.ok, (ratios.median, worst, ratios.largest)
