"""When no plan does all that a spec asks: the nearest one, what it lacks, and the ways out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from llmspec.compiler.cost.memory import Ledger
from llmspec.compiler.search.candidates import Candidate
from llmspec.compiler.search.explain import describe
from llmspec.compiler.search.objective import Objective
from llmspec.compiler.search.predicted import model_object, plan_object, run_object
from llmspec.compiler.search.space import Space
from llmspec.compiler.search.walk import Walk, best
from llmspec.compiler.search.ways_out import Way, ways_in_time, ways_out, without_goals
from llmspec.dsl.program import Prefer, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Infeasible:
    """Nothing does all that is asked.

    goal: what is not met: `memory`, `deadline`, `cost`. best, decisions, ledger: of the smallest
        plan, or of the one that misses the deadline or the cost by least, whose whole run `run`
        is. missing_bytes: what the budget lacks for it. span: where the spec sets the goal, if it
        does.
    """

    goal: str
    best: str
    decisions: dict[str, Any]
    ledger: Ledger
    budget_bytes: int
    missing_bytes: int
    ways_out: tuple[Way, ...]
    considered: int
    pruned: int
    seconds: float
    model: dict[str, Any]
    run: dict[str, Any] | None = None
    limit: float | None = None
    span: Span | None = None


def nothing_fits(space: Space, walk: Walk, smallest: Candidate, start: float) -> Infeasible:
    return Infeasible(
        goal="memory",
        best=describe(smallest),
        decisions=plan_object(space.home(smallest), smallest),
        ledger=smallest.ledger,
        budget_bytes=space.budget_bytes,
        missing_bytes=smallest.peak_bytes - space.budget_bytes,
        ways_out=ways_out(space, smallest),
        considered=walk.considered,
        pruned=walk.pruned,
        seconds=time.perf_counter() - start,
        model=model_object(space),
        span=space.program.budget.span,
    )


def too_late(space: Space, walk: Walk, start: float) -> Infeasible | None:
    """None where nothing fits the memory either."""
    missed = _nearest(space)
    if missed is None:
        return None
    goal, nearest = missed
    budget = space.program.budget
    return Infeasible(
        goal=goal,
        best=describe(nearest),
        decisions=plan_object(space.home(nearest), nearest),
        ledger=nearest.ledger,
        budget_bytes=space.budget_bytes,
        missing_bytes=0,
        ways_out=ways_in_time(space, nearest, goal),
        considered=walk.considered,
        pruned=walk.pruned,
        seconds=time.perf_counter() - start,
        model=model_object(space),
        run=run_object(space, nearest),
        limit=budget.deadline_s if goal == "deadline" else budget.cost,
        span=budget.key_spans.get(goal, budget.span),
    )


def _nearest(space: Space) -> tuple[str, Candidate] | None:
    """(the goal that is missed, the plan that misses it by least). Where each can be met alone, the
    cheapest plan within the deadline misses the cost."""
    budget = space.program.budget

    def least(prefer: Prefer, *free_of: str) -> Candidate | None:
        free = space.changed(budget=without_goals(budget, *free_of))
        found = best(free.apart(), Objective(prefer))
        return None if found is None else space.played(found)

    if budget.deadline_s is not None:
        fastest = least(Prefer.THROUGHPUT, "deadline", "cost")
        if fastest is None or space.run_s(fastest) > budget.deadline_s:
            return None if fastest is None else ("deadline", fastest)
    cheapest = least(Prefer.COST, "cost")
    return None if cheapest is None else ("cost", cheapest)
