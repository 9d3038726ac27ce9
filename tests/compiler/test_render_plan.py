import json
from dataclasses import replace

import pytest

from llmspec.compiler.build.model import build_model
from llmspec.compiler.differences import render_changes
from llmspec.compiler.render_plan import (
    face,
    infeasible_fault,
    plan_block,
    render_found,
)
from llmspec.compiler.search import Found, search
from llmspec.dsl import parse_plan_block
from tests.compiler.specs import CPU, GiB, cluster, llama3, pin, program, tiny_llama


def run(spec):
    model, tokens = spec.model, spec.train.sequence_length
    return search(spec, lambda b: build_model(model, sequences=b, tokens=tokens))


PINS = (pin("tensor", 2), pin("pipeline", 2), pin("zero", 1))


@pytest.fixture(scope="module")
def found():
    return run(program(tiny_llama(), cluster(1, 8, CPU), batch=16, precision="fp32", plan=PINS))


def test_the_printed_block_is_the_plan(found):
    """Pasted back into the spec it leaves nothing to search."""
    pins = parse_plan_block("\n".join(plan_block(found.plan)))
    spec = program(tiny_llama(), cluster(1, 8, CPU), batch=16, precision="fp32", plan=pins)
    again = run(spec)
    assert isinstance(again, Found)
    assert again.plan.decisions() == found.plan.decisions()
    assert again.considered <= 2  # placements that lean to time, and to memory


def test_a_plan_in_words(found):
    text = render_found(found)
    words = f"Plan {found.plan.plan_hash}: llama on 8 x cpu, data 2, zero 1, tensor 2, pipeline 2"
    assert text.startswith(words)
    for part in ("  memory  ", "  step    ", " predicted", "Over the tensor ranks:", "plan {"):
        assert part in text


def test_the_face_sums_up(found):
    data = json.loads(json.dumps(face(found)))
    assert data["schema"] == 1 and data["infeasible"] is None
    predicted = data["predicted"]
    assert sum(predicted["time_s"].values()) == pytest.approx(predicted["step_time_s"])
    assert sum(predicted["memory_bytes"].values()) == predicted["peak_memory_bytes"]
    plan = data["plan"]
    assert plan["world_size"] == plan["data"] * plan["tensor"] * plan["pipeline"] == 8
    assert plan["microbatches"] * plan["microbatch"] * plan["data"] == 16
    axes = {c["axis"] for c in predicted["collectives"]}
    assert axes == {"tensor", "shards", "pipeline", "world"}


def test_what_does_not_fit_reads_like_an_error():
    pins = (pin("zero", 0), pin("tensor", 1), pin("pipeline", 1))
    spec = program(llama3("8b"), cluster(1), batch=8, memory=8 * GiB, plan=pins)
    found = run(spec)
    fault = infeasible_fault(found)
    assert (fault.code, fault.message) == ("E0412", "no plan fits the memory budget")
    assert fault.label.startswith("the smallest plan needs ") and fault.helps
    assert face(found)["plan"] is None
    assert face(found)["infeasible"]["missing_bytes"] > 0


def test_changes_between_plans(found):
    new = replace(found.plan, microbatch=found.plan.microbatch + 1)
    lines = render_changes(found.plan, new).splitlines()
    assert lines[0].startswith("  ~ microbatch  ")
    assert lines[-1] == "Plan: 0 to add, 1 to change, 0 to drop."
