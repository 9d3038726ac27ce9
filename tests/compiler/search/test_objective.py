"""Whatever is preferred, and whatever the run may take: the search against every plan there is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmspec.compiler.search import Found, search
from llmspec.compiler.search.candidates import Candidate
from llmspec.compiler.search.objective import Objective
from llmspec.compiler.search.space import Space
from llmspec.compiler.search.walk import Walk, best
from llmspec.dsl.program import Prefer, Program
from tests.compiler.search.test_space import everything, space
from tests.compiler.specs import H100, GiB, cluster, llama, program, tiny_llama

MiB = 2**20
LARGER = llama(layers=4, width=512, heads=8, kv_heads=4, ffn=1024, vocab=8192, context=512)


def spec(prefer: Prefer, nodes: int, *, bound: bool = True, larger: bool = False) -> Program:
    device = replace(H100, price_per_hour=2.0)
    where = replace(cluster(nodes, 2, device), nodes_are_bound=bound)
    memory = 2 * GiB + (180 if larger else 100) * MiB
    made = program(LARGER if larger else tiny_llama(), where, batch=12, memory=memory)
    return replace(made, prefer=prefer)


def limited(of: Program, **limits: float) -> Program:
    return replace(of, budget=replace(of.budget, **limits))


def every_fitting(of: Space) -> list[Candidate]:
    """With host memory or without, on every number of nodes."""
    found = []
    for here in of.apart():
        more = here.with_offload()
        every = everything(here) + (everything(more) if more else [])
        found += [c for c in every if c.times is not None and here.in_time(c)]
    return sorted(found, key=of.objective.rank)


SIZES = [False, pytest.param(True, marks=pytest.mark.long)]


@pytest.mark.parametrize("larger", SIZES)
@pytest.mark.parametrize("prefer", Prefer)
def test_the_best_of_all_is_found(prefer: Prefer, larger: bool) -> None:
    of = space(spec(prefer, 3, larger=larger))
    every, rank = every_fitting(of), of.objective.rank
    walk = Walk(of.apart(), of.objective)
    walk.run()
    assert rank(walk.shortlist.candidates()[0]) == rank(every[0])
    alone = best(of.apart(), of.objective)
    assert alone is not None and rank(alone) == rank(every[0])
    assert walk.considered <= len(every) or larger, "bounds leave something out"
    for family, found in walk.tally.best.items():
        if family[0] == "gpus":
            assert found.ranks == int(family[1])


@pytest.mark.long
def test_preferences_differ() -> None:
    chosen = {}
    for prefer in Prefer:
        of = space(spec(prefer, 3, larger=True))
        found = best(of.apart(), of.objective)
        assert found is not None
        chosen[prefer] = found
    assert chosen[Prefer.FEWEST_GPUS].ranks < chosen[Prefer.THROUGHPUT].ranks
    assert chosen[Prefer.MEMORY].peak_bytes < chosen[Prefer.THROUGHPUT].peak_bytes
    costs = {p: c.step_s * c.ranks for p, c in chosen.items()}
    assert min(costs, key=costs.__getitem__) is Prefer.COST


@pytest.mark.parametrize("larger", SIZES)
@pytest.mark.parametrize("prefer", Prefer)
def test_a_deadline_is_kept(prefer: Prefer, larger: bool) -> None:
    """Halfway between the fastest run and the one that was chosen without a deadline."""
    free = space(spec(prefer, 3, larger=larger))
    all_of = every_fitting(free)
    # the fastest itself, where that is chosen: played, it takes a little more or less than its
    # closed form says
    slowest = max(free.run_s(c) for c in (all_of[0], free.played(all_of[0])))
    middle = (min(map(free.run_s, all_of)) + slowest) / 2
    middle = max(middle, slowest) if prefer is Prefer.THROUGHPUT else middle
    of = space(limited(free.program, deadline_s=middle))
    every = every_fitting(of)
    found = best(of.apart(), of.objective)
    assert found is not None and of.objective.rank(found) == of.objective.rank(every[0])
    assert of.run_s(of.played(found)) <= middle


def test_a_cost_is_kept() -> None:
    free = space(spec(Prefer.THROUGHPUT, 3))
    every = every_fitting(free)
    costs = sorted(free.run_s(c) / 3600 * c.ranks * 2.0 for c in every)
    of = space(limited(free.program, cost=costs[len(costs) // 8]))
    found = search(of.program, of.chain.build)
    assert isinstance(found, Found)
    run = found.plan.predicted["predicted"]["run"]
    assert run["cost"] <= costs[len(costs) // 8] * (1 + 1e-6)
    allowed = every_fitting(of)
    assert len(allowed) < len(every)
    step_s = found.plan.predicted["predicted"]["step_time_s"]
    assert step_s <= of.played(allowed[0]).step_s * (1 + 1e-3)


def test_chosen_nodes_are_those_of_the_plan() -> None:
    of = spec(Prefer.FEWEST_GPUS, 3)
    found = search(of, space(of).chain.build)
    assert isinstance(found, Found)
    assert found.plan.mesh.world_size == 2
    assert found.plan.predicted["cluster"]["devices"] == 2


numbers = st.tuples(st.floats(1e-3, 1e3), st.floats(1e6, 1e11), st.integers(1, 4096))


@given(st.sampled_from(list(Prefer)), numbers, st.tuples(st.floats(1, 3), st.floats(1, 3)))
def test_weights_of_bounds_bound_weights(prefer, bound, more) -> None:
    step_s, peak, ranks = bound
    of = Objective(prefer)
    low = of.weight(step_s, peak, ranks)
    assert low <= of.weight(step_s * more[0], peak * more[1], ranks)
    assert low <= of.weight(step_s, peak, ranks + 1)
