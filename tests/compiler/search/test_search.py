import dataclasses

import pytest

from llmspec.compiler.build.model import build_model
from llmspec.compiler.errors import Refused
from llmspec.compiler.lower import lower
from llmspec.compiler.plan import EVERYTHING, from_json, to_json
from llmspec.compiler.raising import raise_model, record
from llmspec.compiler.search import Found, Infeasible, search
from llmspec.compiler.search.options import parameter_share
from tests.compiler.specs import CPU, GiB, cluster, llama, pin, program, tiny_gpt, tiny_llama
from tests.models import variants


def run(spec):
    model, tokens = spec.model, spec.train.sequence_length
    return search(spec, lambda b: build_model(model, sequences=b, tokens=tokens))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt])
def test_a_plan_for_every_count_of_processes(model, ranks):
    found = run(program(model(), cluster(1, ranks, CPU), batch=16, precision="fp32"))
    assert isinstance(found, Found)
    plan = found.plan
    assert plan.mesh.world_size == ranks
    assert plan.mesh.data * plan.microbatch * plan.microbatches == 16
    assert plan.stages[0][0] == 0 and plan.stages[-1][1] == 6
    predicted = plan.predicted["predicted"]
    assert sum(predicted["time_s"].values()) == pytest.approx(predicted["step_time_s"])
    assert sum(predicted["memory_bytes"].values()) == predicted["peak_memory_bytes"]
    assert from_json(to_json(plan)).decisions() == plan.decisions()


def test_two_processes_on_a_laptop_share_the_batch():
    found = run(program(tiny_llama(), cluster(1, 2, CPU), batch=16, precision="fp32"))
    assert isinstance(found, Found)
    assert (found.plan.mesh.data, found.plan.zero) == (2, 0)


def test_the_same_program_gives_the_same_bytes():
    spec = program(tiny_gpt(), cluster(1, 4), batch=16)
    texts = {to_json(run(spec).plan) for _ in range(2)}
    assert len(texts) == 1


def test_pins_hold():
    pins = (
        pin("tensor", 2),
        pin("pipeline", 2),
        pin("zero", 2),
        pin("sequence", "off"),
        pin("schedule", "gpipe"),
        pin("stages", (1, 3)),
        pin("microbatch", 2),
        pin("recompute", "full"),
    )
    found = run(program(tiny_llama(), cluster(1, 8), batch=16, plan=pins))
    assert isinstance(found, Found)
    plan = found.plan
    assert (plan.mesh.tensor, plan.mesh.pipeline, plan.mesh.data, plan.zero) == (2, 2, 2, 2)
    assert (plan.sequence, plan.schedule, plan.microbatch) == (False, "gpipe", 2)
    assert plan.stages == ((0, 2), (2, 6))
    assert {s.again for s in plan.recompute["layer"]} == {EVERYTHING}
    assert len(plan.actions) == 2


def test_a_batch_that_no_mesh_divides_names_the_nearest():
    spec = program(tiny_llama(), cluster(1, 8), batch=7, plan=(pin("data", 4),))
    with pytest.raises(Refused) as raised:
        run(spec)
    (diagnostic,) = raised.value.diagnostics
    assert diagnostic.code == "E0408"
    assert "4 sequences (128 tokens) and 8 sequences (256" in diagnostic.helps[0]


def test_pins_that_contradict_the_cluster_are_refused():
    for key, reason in (("data", "no mesh of 8 devices"), ("tensor", "2 key/value heads")):
        spec = program(tiny_llama(), cluster(1, 8), batch=8, plan=(pin(key, 3),))
        with pytest.raises(Refused, match=reason):
            run(spec)


MIDDLING = llama(layers=4, width=1024, heads=8, kv_heads=4, ffn=2048, vocab=8192, context=512)


def test_what_does_not_fit_comes_with_its_ledger_and_ways_out():
    budget = 2 * GiB + 540 * 2**20
    pins = (pin("zero", 0), pin("tensor", 1), pin("pipeline", 1), pin("offload", "none"))
    spec = program(MIDDLING, cluster(1, 4), batch=4, memory=budget, plan=pins)
    found = run(spec)
    assert isinstance(found, Infeasible)
    assert found.missing_bytes == found.ledger.total - budget > 0
    # one pin less is enough, each in its way; then there is the budget itself
    keys = [way.key for way in found.ways_out]
    assert sorted(keys) == ["memory", "memory", "offload", "pipeline", "tensor", "zero"]
    assert all(way.ranks == 4 for way in found.ways_out)
    steps = [way.step_s for way in found.ways_out]
    assert steps == sorted(steps), "the fastest first"
    for way in found.ways_out:
        assert way.key == "memory" or way.peak_bytes <= budget
    assert "without `zero = 0`: 2." in found.ways_out[keys.index("zero")].text
    wider = dataclasses.replace(
        spec, budget=dataclasses.replace(spec.budget, memory_bytes=found.ledger.total)
    )
    assert isinstance(run(wider), Found)


@pytest.mark.parametrize("sequence", ["on", "off"])
@pytest.mark.parametrize("model", [tiny_llama, tiny_gpt])
def test_pinned_tensor_ranks_split_the_model_even_where_links_are_slow(model, sequence):
    pins = (pin("tensor", 2), pin("sequence", sequence))
    spec = program(model(), cluster(1, 4, CPU), batch=8, precision="fp32", plan=pins)
    found = run(spec)
    states = found.plan.placements["layer"].parameters
    graph = build_model(spec.model, sequences=1, tokens=32)
    assert parameter_share(graph, found.plan.placements, 2) <= 0.6
    matrices = [p for p, w in graph.units["layer"].parameters.items() if len(w.shape) == 2]
    assert all(states[path].startswith("split") for path in matrices)


@pytest.mark.parametrize("microbatch", [1, 2])
def test_a_traced_model_may_have_other_operators_at_one_sequence(microbatch):
    module = record(lambda: variants.Model(positions=variants.Sinusoids))
    pins = (pin("tensor", 2), pin("microbatch", microbatch))
    spec = program(
        tiny_llama(), cluster(1, 4, CPU), batch=8, sequence=16, precision="fp32", plan=pins
    )
    graphs = {b: raise_model(module, "m", sequences=b, tokens=16) for b in (1, microbatch)}
    found = search(spec, graphs.__getitem__)
    assert isinstance(found, Found)
    assert found.plan.microbatch == microbatch
    lower(graphs[microbatch], found.plan)


def test_offload_that_the_host_has_no_memory_for_is_refused():
    spec = program(MIDDLING, cluster(1, 4), batch=4, plan=(pin("offload", "optimizer"),))
    assert isinstance(run(spec), Found)
    little = dataclasses.replace(spec.budget, host_memory_bytes=2**28)
    with pytest.raises(Refused, match="of host memory on each node"):
        run(dataclasses.replace(spec, budget=little))
