"""What is asked beside the best plan: the front of memory against time, and why not another."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmspec.compiler.search.best import Told, completion, told
from llmspec.compiler.search.chain import Build
from llmspec.compiler.search.infeasible import Infeasible
from llmspec.compiler.search.pareto import LIMITS, front, undominated
from llmspec.compiler.search.pins import Pins
from llmspec.compiler.search.search import Found, check_meshes, no_collection, no_mesh, search_all
from llmspec.compiler.search.space import Space
from llmspec.dsl.program import Constraint, Program


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """points: the fastest first, each smaller than the one before it. limits: into so many
    steps the way from the fastest plan's peak to the smallest's was cut."""

    points: tuple[Told, ...]
    limits: int
    budget_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WhyNot:
    """chosen: the plan that the search takes. other: the best that keeps the lines asked about, or
    where none fits the smallest. late: it fits, and misses the deadline or the cost. same: they are
    one plan.
    """

    chosen: Told
    other: Told
    same: bool
    late: bool
    budget_bytes: int


def pareto(program: Program, build: Build, limits: int = LIMITS) -> Front | Infeasible:
    """Errors: as of `search`."""
    with no_collection():
        space = Space.of(program, build)
        check_meshes(space.by_nodes())
        points = undominated([space.played(c) for c in front(space, limits)])
        if not points:
            return _infeasible(program, build)
        return Front(
            points=tuple(told(space, c) for c in points),
            limits=limits,
            budget_bytes=space.budget_bytes,
        )


def why_not(program: Program, build: Build, lines: tuple[Constraint, ...]) -> WhyNot | Infeasible:
    """Why the best plan that keeps `lines` is not the one that the search takes. They stand in for
    what the spec says of the same keys. Errors: as of `search`, for the lines too."""
    with no_collection():
        space = Space.of(program, build)
        check_meshes(space.by_nodes())
        chosen = completion(space)
        if chosen is None or chosen[0].times is None or chosen[1]:
            return _infeasible(program, build)
        keys = {line.key for line in lines}
        others = tuple(line for line in program.plan if line.key not in keys)
        asked = space.pinned(Pins.of(replace(program, plan=(*lines, *others))))
        check_meshes(asked.by_nodes())
        best = completion(asked)
        if best is None:
            raise no_mesh(asked.program, "no plan keeps all of these lines")
        return WhyNot(
            chosen=told(space, chosen[0]),
            other=told(asked, best[0]),
            same=space.objective.rank(chosen[0]) == space.objective.rank(best[0]),
            late=best[1],
            budget_bytes=space.budget_bytes,
        )


def _infeasible(program: Program, build: Build) -> Infeasible:
    found = search_all(program, build)
    assert not isinstance(found, Found), "nothing was found before"
    return found
