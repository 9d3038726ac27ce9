"""Precision and optimizer left to the search: the best of the specs that name one of each."""

from __future__ import annotations

from itertools import product

import pytest

from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.errors import Refused
from llmspec.compiler.plan import from_json, to_json
from llmspec.compiler.render_plan import face, render_found
from llmspec.compiler.search import Found, Infeasible
from llmspec.compiler.search.tradeoffs import Front, WhyNot

MODEL = """
import llama
model small = llama(layers=4, width=256, heads=4, kv_heads=2, ffn=512, vocab=8192, context=256)
cluster pod { node = 2 * gpu("H100-SXM") }
"""
PRECISIONS = ("fp32(tf32=on)", "bf16", "bf16(master=none)")
OPTIMIZERS = ("adamw", "sgd(momentum=0.9)")
OPEN = f"precision in [{', '.join(PRECISIONS)}]; optimizer in [{', '.join(OPTIMIZERS)}]"
FASTEST = ("bf16", "sgd(momentum=0.9)")
NAMED = f"precision = {FASTEST[0]}; optimizer = {FASTEST[1]}"
LEAST = ("bf16(master=none)", "sgd(momentum=0.9)")
"""What is stored is smallest."""
PINNED = "pipeline = 1; offload = none; recompute = none"


def session(
    lines: str, memory: str = "20 GiB", prefer: str = "throughput", pins: str = PINNED
) -> driver.Session:
    text = f"""{MODEL}
train t {{ model = small; cluster = pod; dataset = synthetic; batch = 8 sequences; steps = 9
{lines} }}
budget {{ memory = {memory} per gpu }}
prefer {prefer}
plan {{ {pins} }}
"""
    return driver.Session(dsl.load("small.llmspec", text=text))


def weight(found: Found, prefer: str) -> tuple[float, ...]:
    """As plans are compared: to four digits."""
    predicted = found.plan.predicted["predicted"]
    step_s = float(f"{predicted['step_time_s']:.3e}")
    peak = float(f"{predicted['peak_memory_bytes']:.3e}")
    return (peak, step_s) if prefer == "memory" else (step_s,)


CASES = [
    ("20 GiB", "throughput", PINNED),
    pytest.param("1.57 GiB", "throughput", PINNED, marks=pytest.mark.long),
    pytest.param("20 GiB", "memory", PINNED, marks=pytest.mark.long),
    pytest.param("20 GiB", "throughput", "zero = auto", marks=pytest.mark.long),
    pytest.param("1.53 GiB", "throughput", "zero = auto", marks=pytest.mark.long),
    pytest.param("20 GiB", "memory", "zero = auto", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("memory", "prefer", "pins"), CASES)
def test_the_best_of_all_that_could_be_written(memory: str, prefer: str, pins: str) -> None:
    found = driver.find_plan(session(OPEN, memory, prefer, pins))
    assert isinstance(found, Found)
    alone = {}
    for optimizer, precision in product(OPTIMIZERS, PRECISIONS):
        lines = f"precision = {precision}; optimizer = {optimizer}"
        one = driver.find_plan(session(lines, memory, prefer, pins))
        if isinstance(one, Found):
            alone[precision, optimizer] = one
    assert (len(alone) == len(PRECISIONS) * len(OPTIMIZERS)) == (memory == "20 GiB")
    best = min(alone, key=lambda pair: weight(alone[pair], prefer))
    chosen = found.plan.choices
    assert (chosen["precision"], chosen["optimizer"]) == best
    same = {k: v for k, v in found.plan.decisions().items() if k not in ("choices", "spec_hash")}
    other = alone[best].plan.decisions()
    assert same == {k: v for k, v in other.items() if k != "spec_hash"}
    if (memory, prefer) == ("20 GiB", "throughput"):
        every_value_is_explained(found, alone, best)


def every_value_is_explained(
    found: Found, alone: dict[tuple[str, str], Found], best: tuple[str, str]
) -> None:
    told = {lost.family: lost for lost in found.lost}
    ours = found.plan.predicted["predicted"]["step_time_s"]
    for key, value in (*product(("precision",), PRECISIONS), *product(("optimizer",), OPTIMIZERS)):
        if value not in best:
            own = (one for pair, one in alone.items() if value in pair)
            step_s = min(one.plan.predicted["predicted"]["step_time_s"] for one in own)
            slower = told[key, value].slower
            assert slower is not None and slower == pytest.approx(step_s / ours - 1, abs=2e-3)


def test_the_programs_are_those_of_the_spec_that_names_the_choice() -> None:
    open_, named = session(OPEN), session(NAMED)
    found = driver.find_plan(open_)
    assert isinstance(found, Found)
    assert found.plan.choices == dict(zip(("precision", "optimizer"), FASTEST, strict=True))
    assert open_.program.trains == () and from_json(to_json(found.plan)) == found.plan
    assert f"  chosen  precision = {FASTEST[0]}\n" in render_found(found)
    assert face(found)["plan"]["choices"] == found.plan.choices
    other = driver.find_plan(named)
    assert isinstance(other, Found) and other.plan.choices == {}
    files, alone = driver.emit_plan(open_, found.plan), driver.emit_plan(named, other.plan)
    hashes = found.plan.plan_hash, other.plan.plan_hash
    assert hashes[0] != hashes[1]
    said = "# the spec leaves this open, and the search has chosen:\n"
    said += f"#   precision = {FASTEST[0]}\n#   optimizer = {FASTEST[1]}\n"
    assert said in files["train.py"]
    specs = open_.program.source_hash, named.program.source_hash
    for name in ("model.py", "train.py"):
        text = files[name].replace(said, "").replace(*hashes)
        assert text.replace(*specs) == alone[name]


def test_a_plan_may_only_choose_what_its_spec_offers() -> None:
    named = driver.find_plan(session(NAMED))
    assert isinstance(named, Found)
    with pytest.raises(Refused, match="not so"):
        session(OPEN).settle(named.plan)


@pytest.mark.long
def test_why_not_another() -> None:
    of = session(OPEN)
    found = driver.ask_why_not(of, "precision = fp32")
    assert isinstance(found, WhyNot) and not found.same
    assert found.chosen.step_s is not None and found.other.step_s is not None
    assert found.chosen.step_s < found.other.step_s
    chosen = driver.ask_why_not(of, f"precision = {FASTEST[0]}")
    assert isinstance(chosen, WhyNot) and chosen.same


@pytest.mark.long
def test_the_front_is_of_all_combinations() -> None:
    front = driver.find_front(session(OPEN))
    assert isinstance(front, Front)
    ends = [tuple(front.points[i].decisions["choices"].values()) for i in (0, -1)]
    assert ends == [FASTEST, LEAST]


@pytest.mark.long
def test_what_does_not_fit_is_told_of_the_smallest_of_all() -> None:
    found = driver.find_plan(session(OPEN, "1.51 GiB"))
    least = f"precision = {LEAST[0]}; optimizer = {LEAST[1]}"
    alone = driver.find_plan(session(least, "1.51 GiB"))
    assert isinstance(found, Infeasible) and isinstance(alone, Infeasible)
    assert found.ledger.total == alone.ledger.total
    assert tuple(found.decisions["choices"].values()) == LEAST
