"""Random models on random legal plans: every gradient against one device, in float64."""

from __future__ import annotations

import random
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmspec import dsl
from llmspec.compiler.driver import Session, compile_plan
from llmspec.compiler.verify.run import verify_folder
from tests.compiler.verify.random_plans import random_model, random_plan

QUICK, LONG = 16, 300


def check(seed: int) -> None:
    rng = random.Random(seed)
    model = random_model(rng)
    text = f"""{model}
cluster c {{ node = 8 * gpu("H100-SXM") }}
train t {{
    model = m; cluster = c; dataset = synthetic(); steps = 10; sequence_length = 12
    batch = 24 sequences; precision = fp32
}}"""
    program = dsl.load("test.llmspec", text=text)
    graph = Session(program).graph(rng.choice([1, 2]))
    plan = random_plan(graph, rng)
    batch = plan.mesh.data * plan.microbatch * plan.microbatches
    program = replace(program, train=replace(program.train, batch_sequences=batch))
    session = Session(program)
    with tempfile.TemporaryDirectory() as folder:
        compile_plan(session, plan, Path(folder))
        report = verify_folder(folder, session.graph(plan.microbatch), plan, seed=1)
    assert report.ok, (model, plan, [(d.what, d.error) for d in report.failures()[:6]])


@pytest.mark.parametrize("seed", range(QUICK))
def test_seeded(seed: int) -> None:
    check(seed)


@pytest.mark.long
@settings(max_examples=LONG, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(min_value=1000, max_value=10**9))
def test_drawn(seed: int) -> None:
    check(seed)
