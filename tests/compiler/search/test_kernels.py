"""What runs the operators, as a choice of the search."""

from __future__ import annotations

import pytest

from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.driver import Session
from llmspec.compiler.kernels.kinds import EAGER, INDUCTOR, TRITON
from llmspec.compiler.plan import EVERYTHING
from llmspec.compiler.render_plan import render_found
from llmspec.compiler.search import Found
from llmspec.compiler.search.options import TensorOption
from llmspec.compiler.search.space import Space
from tests.compiler.cost.test_live import MODELS as SMALL
from tests.compiler.cost.test_live import spec_text as on_cpus
from tests.compiler.verify.models import MODELS
from tests.compiler.verify.models import spec_text as on_gpus

MIXTURE = """
model m {
    vocab = 32000; context = 512; width = 1024
    block layer(x) {
        x = x + attention(rmsnorm(x), heads=16, kv_heads=4, causal)
        x = x + moe(rmsnorm(x), experts=8, top_k=2, expert=swiglu(ffn=2048))
    }
    tokens -> embed -> layer * 4 -> rmsnorm -> unembed
}
"""
ROUNDING = 1 + 1e-9
GPU = on_gpus(MODELS["gpt"], 4, 64, "kernels = auto", precision="bf16")


def found(text: str) -> Found:
    made = driver.find_plan(Session(dsl.load("test.llmspec", text=text)))
    assert isinstance(made, Found)
    return made


def test_on_gpus_kernels_are_chosen_and_the_plan_says_what_they_save() -> None:
    made = found(GPU)
    plan, predicted = made.plan, made.plan.predicted["predicted"]
    assert plan.kernels == plan.predicted["plan"]["kernels"] == TRITON
    eager = predicted["eager"]
    assert 0.9 * eager["step_time_s"] < predicted["step_time_s"] < 0.99 * eager["step_time_s"]
    assert predicted["memory_bytes"]["activations"] < eager["activations_bytes"]
    assert predicted["peak_memory_bytes"] < eager["peak_memory_bytes"]
    said = render_found(made)
    assert "  kernels triton: 2." in said and " % shorter a step, activations " in said
    assert "    kernels    = triton" in said


def test_the_plan_that_is_told_beside_is_the_one_that_a_pin_gives() -> None:
    made = found(GPU)
    eager = found(GPU.replace("auto", "eager")).plan.predicted["predicted"]
    assert "eager" not in eager
    assert made.plan.predicted["predicted"]["eager"] == {
        "step_time_s": eager["step_time_s"],
        "peak_memory_bytes": eager["peak_memory_bytes"],
        "activations_bytes": eager["memory_bytes"]["activations"],
    }


def test_without_a_line_operators_run_one_by_one() -> None:
    assert found(GPU.replace("kernels = auto", "")).plan.kernels == EAGER


def test_why_not() -> None:
    """A question about kernels is one about plans with them."""
    session = Session(dsl.load("test.llmspec", text=GPU.replace("kernels = auto", "tensor = 1")))
    asked = driver.ask_why_not(session, "kernels = triton")
    assert not hasattr(asked, "ways_out")
    assert asked.chosen.decisions["kernels"] == EAGER  # type: ignore[union-attr]
    assert asked.other.decisions["kernels"] == TRITON  # type: ignore[union-attr]
    assert asked.other.step_s < asked.chosen.step_s  # type: ignore[union-attr, operator]


def test_on_cpus_the_plain_functions_are_slower() -> None:
    made = found(on_cpus(SMALL["llama"], 1, "microbatch = 4; kernels = auto"))
    assert made.plan.kernels == EAGER
    (lost,) = [one for one in made.lost if one.family == ("kernels", TRITON)]
    assert lost.slower is not None and lost.slower > 0 and lost.term == "compute"


def test_on_cpus_they_are_what_fits_where_nothing_else_does() -> None:
    pins = "microbatch = 4; recompute = none; zero = 0; offload = none"
    text = on_cpus(SMALL["llama"], 1, f"{pins}; kernels = auto")
    peaks = [
        found(text.replace("auto", kind)).plan.predicted["predicted"]["peak_memory_bytes"]
        for kind in (EAGER, TRITON)
    ]
    assert peaks[1] < peaks[0] - 2**20
    mib = (peaks[0] - 1) // 2**20
    tight = text.replace("plan {", f"budget {{ memory = {mib} MiB per gpu }}\nplan {{")
    assert found(tight).plan.kernels == TRITON


# --------------------------------------------------------------------------------------------------
# Why one kind alone is weighed on GPUs


def uses(
    space: Space, option: TensorOption, microbatch: int
) -> dict[tuple[object, ...], list[float]]:
    """Of each unit, with nothing computed again and with each set that eager would: seconds, bytes
    kept, the most bytes at once."""
    chain, out = space.chain, {}
    for name, cost in chain.costs(option, microbatch).items():
        plain = chain.with_kernels(option, EAGER)
        sets = [c.operators for c in chain.policies.choices(plain, microbatch, name)]
        passes_s = cost.forward_s + cost.backward_s
        blocks = {i.unit for i in chain.instances if i.prefix}
        for operators in (*sets, EVERYTHING, ()) if name in blocks else ((),):
            again = chain.policies.again(option, microbatch, name, operators)
            if again is None:
                kept, most, again_s = cost.saved_bytes, cost.working_bytes, 0.0
            else:
                kept, most, again_s = again.kept_bytes, again.working_bytes, again.forward_s
            out[name, operators] = [passes_s + again_s, kept, kept + most]
    return out


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("model", [*MODELS, "mixture"])
def test_on_gpus_a_plan_with_kernels_is_no_worse_than_the_same_without(
    model: str, precision: str
) -> None:
    """In time and in bytes, whatever the placement, the micro-batch and what is computed again."""
    text = on_gpus((MODELS | {"mixture": MIXTURE})[model], 4, 8, "", precision)
    session = Session(dsl.load("test.llmspec", text=text))
    space = Space.of(session.program, session.graph)
    compared = 0
    for tensor, microbatch in ((1, 1), (1, 4), (2, 2), (4, 1)):
        for sketch in space.sketches():
            if sketch.grid.tensor != tensor or sketch.view.context > 1 or sketch.view.expert > 1:
                continue
            for option in space.tensor_options(tensor, microbatch, sketch.view):
                apart = uses(space, space.chain.with_kernels(option, EAGER), microbatch)
                ours = uses(space, space.chain.with_kernels(option, TRITON), microbatch)
                theirs = uses(space, space.chain.with_kernels(option, INDUCTOR), microbatch)
                assert apart.keys() == ours.keys() == theirs.keys()
                for at, eager in apart.items():
                    triton, inductor = ours[at], theirs[at]
                    assert triton[0] <= inductor[0] * ROUNDING <= eager[0] * ROUNDING**2
                    assert triton[1:] == inductor[1:]
                    assert triton[1] <= eager[1] and triton[2] <= eager[2]
                    compared += 1
            break
    assert compared > 40
