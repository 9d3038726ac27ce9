"""Every gradient of programs whose blocks compute some operators again, on real processes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from llmspec.compiler.errors import Refused
from llmspec.compiler.plan import EVERYTHING, Stretch
from llmspec.compiler.verify.plan import verify_plan
from tests.compiler.verify.models import MODELS, planned, spec_text

OPERATORS = {
    "llama": ("rmsnorm", "attention", "swiglu"),
    "gpt": ("layernorm", "attention", "dropout", "mlp"),
}
MESHES = {
    "microbatch = 4": 1,
    "data = 2; zero = 3; microbatch = 2": 2,
    "tensor = 2; sequence = on; microbatch = 2": 2,
    "pipeline = 2; schedule = 1f1b; microbatch = 2": 2,
}
EVERY = [
    (model, mesh, names)
    for model, operators in OPERATORS.items()
    for mesh in MESHES
    for count in (1, 2, len(operators))
    for names in itertools.combinations(operators, count)
]
FEW = [
    ("gpt", "data = 2; zero = 3; microbatch = 2", ("attention", "dropout")),
    ("llama", "tensor = 2; sequence = on; microbatch = 2", ("rmsnorm", "swiglu")),
]


def check(model: str, mesh: str, recompute: str, devices: int | None = None) -> None:
    pins = f"{mesh}; recompute = {recompute}"
    session, plan = planned(spec_text(MODELS[model], devices or MESHES[mesh], 8, pins))
    assert any(s.again for own in plan.recompute.values() for s in own), "something runs again"
    report, small = verify_plan(session, plan, largest=4)
    assert any(s.again for own in small.recompute.values() for s in own)
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]


@pytest.mark.parametrize(("model", "mesh", "names"), FEW)
def test_listed_operators(model, mesh, names):
    check(model, mesh, f"[{', '.join(names)}]")


@pytest.mark.long
@pytest.mark.parametrize(("model", "mesh", "names"), EVERY)
def test_every_list_of_operators(model, mesh, names):
    check(model, mesh, f"[{', '.join(names)}]")


@pytest.mark.long
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "mesh",
    [
        "pipeline = 2; schedule = zero_bubble; microbatch = 2",
        "pipeline = 2; interleave = 2; schedule = interleaved; microbatch = 2",
        "pipeline = 2; tensor = 2; sequence = on; microbatch = 2; schedule = 1f1b",
        "context = 2; context_style = ring; microbatch = 2",
        "data = 2; zero = 3; microbatch = 2; offload = activations",
    ],
)
def test_with_the_rest(model, mesh):
    devices = 4 if "tensor" in mesh else 2
    last = "swiglu" if model == "llama" else "mlp"
    check(model, mesh, f"[attention, {last}]", devices)


@pytest.mark.parametrize("mesh", ["pipeline = 2; schedule = 1f1b; microbatch = 2"])
def test_blocks_that_differ(mesh):
    """The first blocks compute everything again, others some operators, the last nothing."""
    session, plan = planned(spec_text(MODELS["gpt"], 2, 8, f"{mesh}; recompute = [mlp]"))
    ((_, again),) = ((s.blocks, s.again) for s in plan.recompute["layer"])
    mixed = (
        Stretch(blocks=3, again=EVERYTHING),
        Stretch(blocks=3, again=again),
        Stretch(blocks=2, again=()),
    )
    edited = replace(plan, recompute=plan.recompute | {"layer": mixed})
    report, small = verify_plan(session, edited)
    assert [s.again for s in small.recompute["layer"]] == [EVERYTHING, again, ()]
    assert report.ok, [(d.what, d.error) for d in report.failures()[:8]]


def test_a_plan_names_operators_that_are_there():
    session, plan = planned(spec_text(MODELS["llama"], 1, 8, "microbatch = 4; recompute = none"))
    wrong = (Stretch(blocks=8, again=("rmsnorm_norme",)),)
    edited = replace(plan, recompute=plan.recompute | {"layer": wrong})
    with pytest.raises(Refused, match="rmsnorm_norme"):
        verify_plan(session, edited)
    short = replace(plan, recompute=plan.recompute | {"layer": (Stretch(blocks=3),)})
    with pytest.raises(Refused, match="3 uses of `layer`, it has 8"):
        session.graph(plan.microbatch)
        from llmspec.compiler.driver import lower_plan

        lower_plan(session, short)


def test_a_list_names_operators_that_are_there():
    with pytest.raises(Refused, match="swiglo"):
        planned(spec_text(MODELS["llama"], 1, 8, "recompute = [swiglo]"))
