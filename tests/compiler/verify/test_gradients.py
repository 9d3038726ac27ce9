"""Every gradient of emitted programs, on real processes, against one device in float64."""

from __future__ import annotations

import itertools

import pytest
from torch import fx

from llmspec.compiler.driver import Session
from llmspec.compiler.ops.registry import entry_of
from llmspec.compiler.plan import Plan
from llmspec.compiler.verify.plan import verify_plan
from tests.compiler.verify.models import DROPPED, MODELS, planned, spec_text

Case = tuple[int, int, str]
"""Devices, sequences per step, pins."""

DATA: list[Case] = [
    (1, 8, "microbatch = 4"),
    (1, 8, "microbatch = 8; recompute = full"),
    *((2, 8, f"data = 2; zero = {z}; microbatch = 2") for z in range(4)),
    *((4, 8, f"data = 4; shard = 2; zero = {z}; microbatch = 1") for z in (1, 2, 3)),
    (3, 12, "data = 3; zero = 3; microbatch = 2"),
    (3, 12, "data = 3; zero = 0; microbatch = 4"),
]

TENSOR: list[Case] = [
    (n, 4, f"tensor = {n}; sequence = {s}; microbatch = 2; recompute = {r}")
    for n, s, r in itertools.product((2, 4), ("on", "off"), ("none", "full"))
]

PIPELINE: list[Case] = [
    (2, 8, "pipeline = 2; schedule = 1f1b; microbatch = 8; stages = [3, 5]"),
    (2, 8, "pipeline = 2; schedule = gpipe; microbatch = 4; recompute = full"),
    (2, 8, "pipeline = 2; schedule = 1f1b; microbatch = 2; stages = [5, 3]"),
    (4, 8, "pipeline = 4; schedule = 1f1b; microbatch = 2; zero = 0"),
    (4, 8, "pipeline = 4; schedule = gpipe; microbatch = 4; stages = [1, 2, 2, 3]"),
]

COMBINED: list[Case] = [
    (4, 8, "pipeline = 2; data = 2; zero = 1; schedule = 1f1b; microbatch = 1"),
    (4, 8, "pipeline = 2; data = 2; zero = 2; schedule = gpipe; microbatch = 2"),
    (4, 8, "pipeline = 2; data = 2; zero = 3; schedule = 1f1b; microbatch = 1; recompute = full"),
    (4, 8, "tensor = 2; data = 2; zero = 3; microbatch = 2; sequence = on"),
    (8, 8, "data = 2; pipeline = 2; tensor = 2; zero = 1; microbatch = 1; schedule = 1f1b"),
    (8, 8, "data = 2; pipeline = 2; tensor = 2; zero = 3; microbatch = 2; schedule = gpipe"),
]

EVERY_PIPELINE: list[Case] = [
    (
        ranks * data,
        8 * data,
        f"pipeline = {ranks}; data = {data}; schedule = {schedule}; zero = {zero}; "
        f"microbatch = {8 // micro}; stages = {stages}; recompute = {recompute}",
    )
    for ranks, uneven, even in ((2, "[3, 5]", "[4, 4]"), (4, "[1, 2, 2, 3]", "[2, 2, 2, 2]"))
    for schedule, micro, stages, (data, zero) in itertools.product(
        ("gpipe", "1f1b"), (1, 2, 4), (uneven, even), ((1, 0), (2, 1), (2, 2), (2, 3))
    )
    for recompute in ("none",)
]


def splits_products(session: Session, plan: Plan) -> bool:
    products = [n for n in session.graph(plan.microbatch).units["layer"].calls() if is_product(n)]
    nodes = plan.placements["layer"].nodes
    return len(products) >= 6 and all(nodes[n.name].startswith("split") for n in products)


def is_product(node: fx.Node) -> bool:
    return entry_of(node).contraction


def check(model: str, case: Case) -> None:
    devices, batch, pins = case
    session, plan = planned(spec_text(MODELS.get(model, model), devices, batch, pins))
    report, small = verify_plan(session, plan, largest=4)
    assert small.mesh == plan.mesh, "the mesh under test is the plan's"
    assert plan.mesh.tensor == 1 or splits_products(session, plan), (
        "tensor ranks share the block's products"
    )
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", DATA + TENSOR + PIPELINE + COMBINED, ids=lambda c: c[2])
def test_gradients(model: str, case: Case) -> None:
    check(model, case)


DROPPED_WEIGHTS: list[Case] = [
    (4, 8, "tensor = 2; data = 2; zero = 3; microbatch = 2; sequence = on"),
    (4, 8, "context = 2; data = 2; zero = 2; microbatch = 2"),
    (4, 8, "data = 2; pipeline = 2; zero = 1; microbatch = 2; schedule = 1f1b; "
     "recompute = selective"),
]  # fmt: skip


@pytest.mark.parametrize("case", DROPPED_WEIGHTS, ids=lambda c: c[2])
def test_dropout_inside_attention(case: Case) -> None:
    check(DROPPED, case)


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", EVERY_PIPELINE, ids=lambda c: c[2])
def test_every_pipeline(model: str, case: Case) -> None:
    check(model, case)


RAMPS = [
    (2, "pipeline = 2; schedule = 1f1b; microbatch = 2; stages = [3, 5]"),
    (2, "data = 2; zero = 1; microbatch = 1"),
]
MORE_RAMPS = [
    (4, "pipeline = 4; schedule = gpipe; microbatch = 2"),
    (4, "pipeline = 2; data = 2; zero = 1; schedule = 1f1b; microbatch = 1"),
    (4, "pipeline = 2; data = 2; zero = 3; schedule = gpipe; microbatch = 1"),
    (2, "tensor = 2; sequence = on; microbatch = 2"),
]


def check_ramp(devices: int, pins: str) -> None:
    text = spec_text(MODELS["gpt"], devices, 16, pins)
    ramp = "ramp(from=4 sequences, to=16 sequences, steps=4)"
    session, plan = planned(text.replace("16 sequences", ramp))
    assert len(plan.ramp_actions) == (2 if plan.mesh.pipeline > 1 else 0)
    report, small = verify_plan(session, plan, largest=4)
    before = {str(n) for n in (1, 2, 4) if n < small.microbatches}
    losses = sum(d.what == "loss" for d in report.differences)
    assert losses == len(before) + 1, "a step of each size"
    assert set(small.ramp_actions) == (before if plan.mesh.pipeline > 1 else set())
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]


@pytest.mark.parametrize(("devices", "pins"), RAMPS)
def test_every_size_of_a_ramp(devices: int, pins: str) -> None:
    check_ramp(devices, pins)


@pytest.mark.long
@pytest.mark.parametrize(("devices", "pins"), MORE_RAMPS)
def test_every_size_of_more_ramps(devices: int, pins: str) -> None:
    check_ramp(devices, pins)
