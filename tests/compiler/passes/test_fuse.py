"""Which operators become one kernel, and that kernels compute what the operators do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from llmspec.compiler import driver
from llmspec.compiler.graph import Unit
from llmspec.compiler.kernels.kernel import Kernel
from llmspec.compiler.ops import elementwise, linear, norm
from llmspec.compiler.passes.fuse import fuse_unit
from tests.compiler.kernels.groups import Draft, gradients, module_of, run, units, values_of
from tests.compiler.verify.models import MODELS, planned, spec_text


def names(unit: Unit) -> list[list[str]]:
    return [
        [n.name for n in c.target.group.members]
        for c in unit.calls()
        if isinstance(c.target, Kernel)
    ]


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(units())
def test_kernels_compute_what_their_operators_do(unit: Unit) -> None:
    fused = fuse_unit(unit)
    ours, theirs = values_of(unit), values_of(unit)
    module = module_of(fused) if names(fused) else None
    result, expected = run(fused, ours, module), run(unit, theirs)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    found, wanted = gradients(result, ours), gradients(expected, theirs)
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


def lowered(model: str, pins: str, devices: int = 1) -> Unit:
    session, plan = planned(spec_text(MODELS[model], devices, 8, pins, precision="bf16"))
    return driver.lower_plan(session, plan).units["layer"]


def test_groups_of_a_llama() -> None:
    assert names(fuse_unit(lowered("llama", "microbatch = 4"))) == [
        ["rmsnorm_normed"],
        ["attention_q_3"],
        ["attention_k_3"],
        ["x_1", "rmsnorm_2_normed"],
        ["swiglu_gate_2", "swiglu_hidden"],
    ]


def test_groups_of_a_gpt() -> None:
    assert names(fuse_unit(lowered("gpt", "microbatch = 4"))) == [
        ["layernorm_normed"],
        ["dropout_dropped", "x_1", "layernorm_2_normed"],
        ["mlp_up_2", "mlp_hidden"],
        ["dropout_2_dropped", "x_2"],
    ]


@pytest.mark.parametrize("sequence", ["on", "off"])
def test_no_group_holds_a_collective(sequence: str) -> None:
    unit = lowered("llama", f"tensor = 4; sequence = {sequence}; microbatch = 4", devices=4)
    fused = fuse_unit(unit)
    assert sum("move" in n.meta for n in fused.calls()) == sum(
        "move" in n.meta for n in unit.calls()
    )
    inside = [n for g in names(fused) for n in g]
    assert inside and not any("all_" in n or "reduce" in n for n in inside)


def test_what_is_computed_again_is_no_part_of_what_is_not() -> None:
    unit = lowered("llama", "microbatch = 4")
    found = names(fuse_unit(unit, [("rmsnorm_2_normed", "swiglu_gate_2", "swiglu_hidden")]))
    assert ["x_1", "rmsnorm_2_normed"] not in found, "x_1 is kept, the norm is not"
    assert ["swiglu_gate_2", "swiglu_hidden"] in found
    found = names(fuse_unit(unit, [("swiglu_gate_2",)]))
    assert ["swiglu_gate_2", "swiglu_hidden"] not in found
    assert ["x_1", "rmsnorm_2_normed"] in found


def test_no_path_leaves_a_group_and_comes_back() -> None:
    draft = Draft((2, 3, 64))
    x = draft.given((2, 3, 64))
    a = draft.call(elementwise.gelu, x)
    w = draft.graph.create_node("get_attr", "w")
    draft._with(w, torch.empty(64, 64, device="meta"), "w", ())
    from llmspec.compiler.graph import Parameter

    w.meta["parameter"] = Parameter(path="w", shape=(64, 64), dims="OI", init=None)  # type: ignore[arg-type]
    draft.parameters["w"] = w.meta["parameter"]
    b = draft.call(linear.linear, a, w)
    unit = draft.unit(draft.call(elementwise.multiply, a, b))
    assert names(fuse_unit(unit)) == []


def test_a_row_that_no_multiprocessor_holds_stays_apart() -> None:
    for width, fits in ((4096, True), (65536, False)):
        draft = Draft((2, 8, width))
        x, y = draft.given((2, 8, width)), draft.given((2, 8, width))
        total = draft.call(elementwise.add, x, y)
        normed = draft.call(norm.rms_norm, total, draft.weight(width), 1e-5)
        unit = draft.unit(draft.call(elementwise.multiply, total, normed))
        assert any("rms_norm" in n for g in names(fuse_unit(unit)) for n in g) == fits


def test_what_is_kept_is_a_smallest_cut() -> None:
    """A norm of a sum keeps the sum, which is one value, and not its two terms."""
    draft = Draft((2, 8, 64))
    x, y = draft.given((2, 8, 64)), draft.given((2, 8, 64))
    total = draft.call(elementwise.add, x, y)
    unit = draft.unit(draft.call(norm.rms_norm, total, draft.weight(64), 1e-5))
    (call,) = [c for c in fuse_unit(unit).calls() if isinstance(c.target, Kernel)]
    group = call.target.group
    assert [e.label for e in group.kept_inside] == ["add"]
    assert [i.name for i in group.kept_inputs] == ["weight"]
