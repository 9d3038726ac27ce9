"""float32 within its own tolerance; half precision no worse than one device in the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmspec.compiler.driver import Session, compile_plan
from llmspec.compiler.plan import MeshSizes
from llmspec.compiler.verify.compare import FLOAT32
from llmspec.compiler.verify.half import error_ratios
from llmspec.compiler.verify.plan import verify_plan
from llmspec.compiler.verify.run import verify_folder
from llmspec.compiler.verify.shrink import shrink, small_recompute
from tests.compiler.verify.models import MODELS, planned, spec_text

Case = tuple[int, int, str]
"""Devices, sequences per step, pins."""

CASES: list[Case] = [
    (2, 8, "data = 2; zero = 0; microbatch = 2"),
    (2, 8, "data = 2; zero = 3; microbatch = 2; recompute = full"),
    (2, 4, "tensor = 2; sequence = on; microbatch = 2"),
    (2, 4, "tensor = 2; sequence = off; microbatch = 2"),
    (2, 8, "pipeline = 2; schedule = 1f1b; microbatch = 2"),
    (8, 8, "data = 2; pipeline = 2; tensor = 2; zero = 2; microbatch = 1; schedule = 1f1b"),
]
VARIANTS = (
    "fp16",
    "fp16(reduce=fp16)",
    "bf16(reduce=bf16)",
    "bf16(master=none)",
    "bf16(master=none, moments=bf16, reduce=bf16, rounding=stochastic)",
)
PURE = VARIANTS[-1]
MORE_CASES = [
    *CASES,
    (2, 8, "data = 2; zero = 1; microbatch = 2"),
    (2, 8, "data = 2; zero = 2; microbatch = 2"),
    (4, 8, "data = 4; shard = 2; zero = 3; microbatch = 1"),
    (2, 8, "context = 2; context_style = ring; microbatch = 2"),
    (2, 8, "context = 2; context_style = ulysses; microbatch = 2; zero = 2"),
]
SPLIT = (4, 16, "data = 2; pipeline = 2; zero = 3; microbatch = 2; schedule = zero_bubble")
"""Gradients of weights that arrive apart from those of values."""
MORE_CASES.append(SPLIT)
ONE_EACH = [
    ("fp16", "gpt", CASES[4]),
    ("fp16(reduce=fp16)", "gpt", CASES[0]),
    ("bf16(reduce=bf16)", "llama", CASES[2]),
    ("bf16(master=none)", "gpt", MORE_CASES[6]),
    (PURE, "llama", CASES[0]),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[2])
def test_float32(model: str, case: Case, tmp_path: Path) -> None:
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


def check(model: str, case: Case, precision: str, folder: Path) -> None:
    """The sharded program's errors against float32 beside those of the same on one process."""
    devices, batch, pins = case
    session, plan = planned(spec_text(MODELS[model], devices, batch, pins, precision=precision))
    program, small = shrink(session.program, plan)
    little = Session(program)
    compile_plan(little, small, folder / "sharded")
    blocks = small.stages[-1][1]
    rows = program.train.batch_sequences
    single = planned(
        spec_text(MODELS[model], 1, rows, f"microbatch = {small.microbatch}", precision=precision)
    )[1]
    graph = little.graph(small.microbatch)
    alone = replace(
        single,
        recompute=small_recompute(single.recompute, graph),
        mesh=MeshSizes(),
        stages=((0, blocks),),
        microbatch=small.microbatch,
        microbatches=rows // small.microbatch,
    )
    compile_plan(little, alone, folder / "single")
    ratios = error_ratios(
        (str(folder / "sharded"), small),
        (str(folder / "single"), alone),
        little.graph(small.microbatch),
        program.train.seed,
    )
    worst = max(ratios.by_name, key=lambda n: ratios.by_name[n])
    assert ratios.ok, (ratios.median, ratios.whole, worst, ratios.largest)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c[2])
def test_bf16(model: str, case: Case, tmp_path: Path) -> None:
    check(model, case, "bf16", tmp_path)


def test_split_backward(tmp_path: Path) -> None:
    check("llama", SPLIT, "bf16", tmp_path)


@pytest.mark.parametrize(("precision", "model", "case"), ONE_EACH, ids=str)
def test_variants(precision: str, model: str, case: Case, tmp_path: Path) -> None:
    check(model, case, precision, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("precision", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", MORE_CASES, ids=lambda c: c[2])
def test_every_variant(precision: str, model: str, case: Case, tmp_path: Path) -> None:
    check(model, case, precision, tmp_path)


@pytest.mark.parametrize(
    ("precision", "model", "case"), [*ONE_EACH, ("fp16", "llama", CASES[5])], ids=str
)
def test_mathematics(precision: str, model: str, case: Case) -> None:
    """In float64, the same program is the reference to the last digits: the loss scale, the casts
    and the reductions are no more than that."""
    devices, batch, pins = case
    session, plan = planned(spec_text(MODELS[model], devices, batch, pins, precision=precision))
    report, _ = verify_plan(session, plan)
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]
