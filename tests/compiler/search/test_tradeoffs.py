"""The front of memory against time, and why not another plan, against pricing every plan."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llmspec.compiler.search.candidates import Candidate
from llmspec.compiler.search.pareto import FASTEST, budgets, front, undominated
from llmspec.compiler.search.space import Space
from llmspec.compiler.search.tradeoffs import WhyNot, why_not
from llmspec.dsl import SpecError, program_under
from llmspec.dsl.program import Prefer, Relation
from tests.compiler.search.test_space import everything, space
from tests.compiler.specs import GiB, cluster, llama, pin, program

MiB = 2**20
MODEL = llama(layers=3, width=256, heads=4, kv_heads=2, ffn=512, vocab=2048, context=256)


def spec(*pins, memory: int = 2 * GiB + 50 * MiB):  # type: ignore[no-untyped-def]
    return program(MODEL, cluster(1, 2), batch=4, memory=memory, plan=pins)


def every(of: Space) -> list[Candidate]:
    """All that fit, with host memory or without, full recomputation among them."""
    found = everything(of)
    if (more := of.with_offload()) is not None:
        found += everything(more)
    return [c for c in found if c.times is not None]


def under(of: Space, limit: int, prefer: Prefer = Prefer.THROUGHPUT) -> list[Candidate]:
    budget = replace(of.program.budget, memory_bytes=limit)
    return every(of.changed(budget=budget, prefer=prefer))


def points(found: list[Candidate]) -> list[tuple[int, float]]:
    return [(c.peak_bytes, round(c.step_s, 12)) for c in found]


def test_the_front_of_fixed_plans_is_exact() -> None:
    """Where nothing is fitted to a budget, plans are the same under every budget, and the front at
    a fine grid is the front of them all."""
    fixed = pin("recompute", "none", "full", relation=Relation.IN)
    of = space(spec(fixed, pin("offload", "none")))
    assert points(list(front(of, limits=20_000))) == points(list(undominated(every(of))))


@pytest.mark.parametrize("limits", [3, pytest.param(12, marks=pytest.mark.long)])
def test_every_point_is_the_fastest_under_its_budget(limits: int) -> None:
    """Blocks that compute again, and host memory, as each budget needs them."""
    of = space(spec())
    found = front(of, limits)
    steps = [c.step_s for c in found]
    peaks = [c.peak_bytes for c in found]
    assert steps == sorted(steps) and peaks == sorted(peaks, reverse=True) and len(found) > 2
    assert min(c.peak_bytes for c in under(of, of.budget_bytes, Prefer.MEMORY)) == peaks[-1]
    # a smaller one may be as fast, and then stands for it
    fastest = min(under(of, of.budget_bytes), key=FASTEST.rank)
    for limit in budgets(peaks[-1], fastest.peak_bytes, limits):
        fitting = under(of, limit)
        own = next(c for c in found if c.peak_bytes <= limit)
        assert own.step_s == pytest.approx(min(c.step_s for c in fitting))


def asked(text: str, **limits: float) -> tuple[Space, WhyNot]:
    of = space(spec())
    budget = replace(of.program.budget, **limits)
    made = replace(of.program, budget=budget)
    found = why_not(made, of.chain.build, program_under(text, made))
    assert isinstance(found, WhyNot)
    return of, found


def test_the_best_completion_of_what_is_asked() -> None:
    of, found = asked("tensor = 2, zero in [0, 1]")
    fitting = [c for c in every(of) if c.shape.grid.tensor == 2 and c.zero < 2 and not c.offload]
    fastest = min(of.played(c).step_s for c in fitting)
    assert not found.same and not found.late
    assert found.other.step_s == pytest.approx(fastest, rel=1e-3)
    assert found.other.decisions["tensor"] == 2
    assert sum(found.other.times_s.values()) == pytest.approx(found.other.step_s)


@pytest.mark.long
def test_what_is_chosen_anyway_is_said_so() -> None:
    _, plain = asked("tensor = 2")
    decided = plain.chosen.decisions
    _, found = asked(f"data = {decided['data']}; tensor = {decided['tensor']}")
    assert found.same and found.other.words == found.chosen.words


def test_what_is_too_large_or_too_late() -> None:
    _, plain = asked("tensor = 2")
    assert plain.chosen.run_s is not None and plain.other.run_s is not None
    _, found = asked("tensor = 2", deadline_s=(plain.chosen.run_s + plain.other.run_s) / 2)
    assert found.late and found.other.step_s is not None
    smallest = plain.chosen.peak_bytes
    of = space(spec(memory=smallest))
    under = program_under("recompute = none, zero = 0, offload = none, data = 2", of.program)
    larger = why_not(of.program, of.chain.build, under)
    assert isinstance(larger, WhyNot)
    assert larger.other.step_s is None and larger.other.peak_bytes > smallest


@pytest.mark.parametrize("text", ["tensor = 3", "tensor = 4; data = 1", "speed = 9", "tensor = ["])
def test_what_cannot_be_is_refused_with_its_reason(text: str) -> None:
    with pytest.raises(SpecError):
        program_under(text, spec())
