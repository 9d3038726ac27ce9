"""The front of memory against time: plans that nothing else is both smaller and faster than."""

from __future__ import annotations

from dataclasses import replace

from llmspec.compiler.search.candidates import Candidate
from llmspec.compiler.search.objective import Objective
from llmspec.compiler.search.space import Space
from llmspec.compiler.search.walk import best
from llmspec.dsl.program import Prefer

LIMITS = 24
"""Steps from the fastest plan's peak down to the smallest's, for which the fastest is found."""

FASTEST = Objective(Prefer.THROUGHPUT, exact=True)
SMALLEST = Objective(Prefer.MEMORY, exact=True)


def front(space: Space, limits: int = LIMITS) -> tuple[Candidate, ...]:
    """The fastest plan, the smallest, and of each budget between their peaks the fastest under it.

    Each point is exact: under its budget branch and bound finds the plan that pricing every one
    would. A budget that the last point keeps to is not asked again. What computes again where
    memory is short has a point at every budget, so there is no end to a finer grid.
    """
    smallest = best(_smallest_spaces(space), SMALLEST)
    fastest = best(_under(space, space.budget_bytes), FASTEST)
    if smallest is None or fastest is None:
        return ()
    found = [fastest]
    for limit in budgets(smallest.peak_bytes, fastest.peak_bytes, limits):
        if found[-1].peak_bytes > limit and (next_one := best(_under(space, limit), FASTEST)):
            found.append(next_one)
    return undominated([*found, smallest])


def budgets(least: int, most: int, count: int) -> list[int]:
    """From the most down to the least, which comes in addition."""
    return [least + (most - least) * part // count for part in range(count, -1, -1)]


def _under(space: Space, limit: int) -> tuple[Space, ...]:
    return _preferring(space, Prefer.THROUGHPUT, limit).apart()


def _smallest_spaces(space: Space) -> tuple[Space, ...]:
    return _preferring(space, Prefer.MEMORY, space.budget_bytes).apart()


def _preferring(space: Space, prefer: Prefer, limit: int) -> Space:
    budget = replace(space.program.budget, memory_bytes=limit)
    return space.changed(budget=budget, prefer=prefer)


def undominated(found: list[Candidate]) -> tuple[Candidate, ...]:
    """Those than which none is as fast and smaller, or as small and faster."""
    kept: list[Candidate] = []
    for one in sorted(found, key=lambda c: (c.step_s, c.peak_bytes, FASTEST.rank(c))):
        if not kept or one.peak_bytes < kept[-1].peak_bytes:
            kept.append(one)
    return tuple(kept)
