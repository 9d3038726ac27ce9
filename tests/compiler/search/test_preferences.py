"""Examples that each technique is for: the search takes it, and so does pricing every plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llmspec import dsl
from llmspec.compiler.cost.offload import PARAMETERS
from llmspec.compiler.schedules import Schedule
from llmspec.compiler.search.candidates import Candidate
from llmspec.compiler.search.space import Space
from llmspec.compiler.search.walk import Walk
from tests.compiler.search.test_space import everything, space

GiB = 2**30
EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


def example(name: str) -> Space:
    program = dsl.load(EXAMPLES / f"{name}.llmspec")
    assert not program.plan, "nothing is pinned"
    return space(program)


def chosen(of: Space) -> Candidate:
    """The search's, and of all plans there are the best."""
    walk = Walk((of,), of.objective)
    walk.run()
    found = walk.shortlist.candidates()[0]
    more = of.with_offload()
    assert more is not None, "an example with GPUs"
    every = [c for part in (of, more) for c in everything(part) if c.times is not None]
    assert of.objective.rank(found) == min(map(of.objective.rank, every))
    return found


def smaller(of: Space, *, batch: int, nodes: int) -> Space:
    """The example with fewer sequences and nodes, so that there are fewer plans."""
    program = of.program
    train = replace(program.train, batch_sequences=batch)
    return space(replace(program, train=train, cluster=program.cluster.of(nodes)))


LESS_BUBBLE = (Schedule.INTERLEAVED, Schedule.ZERO_BUBBLE, Schedule.ZBV)
PREFERRED: dict[str, Callable[[Candidate], bool]] = {
    "few_microbatches": lambda c: c.mesh.pipeline > 1 and c.schedule in LESS_BUBBLE,
    "many_experts": lambda c: c.mesh.expert > 1,
    "llama3_8b_long": lambda c: c.mesh.context > 1,
    "mixtral_8x7b": lambda c: c.mesh.expert > 1,
}


def test_few_microbatches_bring_a_schedule_with_less_of_a_bubble() -> None:
    assert PREFERRED["few_microbatches"](chosen(example("few_microbatches")))


def test_many_experts_bring_expert_ranks() -> None:
    assert PREFERRED["many_experts"](chosen(smaller(example("many_experts"), batch=8, nodes=2)))


@pytest.mark.long
def test_long_sequences_bring_context_ranks() -> None:
    assert PREFERRED["llama3_8b_long"](chosen(smaller(example("llama3_8b_long"), batch=4, nodes=1)))


@pytest.mark.long
@pytest.mark.parametrize("name", PREFERRED)
def test_at_full_size(name: str) -> None:
    assert PREFERRED[name](chosen(example(name)))


BUDGETS = (72, 36, 20, 10)


def operators_again(of: Candidate) -> int:
    return sum(len(names) for names in of.recompute)


def test_a_tighter_budget_brings_recomputation_then_more_then_offload() -> None:
    roomy = example(f"budget_{BUDGETS[0]}gib")
    found = {}
    for gib in BUDGETS:
        budget = dsl.load(EXAMPLES / f"budget_{gib}gib.llmspec").budget
        assert budget.memory_bytes == gib * GiB
        found[gib] = chosen(roomy.changed(budget=budget))
    plain, some, more, moved = found.values()
    assert operators_again(plain) == 0 < operators_again(some) < operators_again(more)
    assert not (plain.offload or some.offload or more.offload)
    assert PARAMETERS in moved.offload
    steps = [candidate.step_s for candidate in found.values()]
    assert steps == sorted(steps)
