"""What is asked beside the best plan: the front of memory against time, and why not another."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmspec.compiler.search.best import Told, completion, told
from llmspec.compiler.search.candidates import Candidate
from llmspec.compiler.search.chain import Build
from llmspec.compiler.search.infeasible import Infeasible
from llmspec.compiler.search.pareto import LIMITS, front, undominated
from llmspec.compiler.search.pins import Pins
from llmspec.compiler.search.search import Found, check_meshes, no_collection, no_mesh, search_all
from llmspec.compiler.search.space import Space
from llmspec.dsl.left_open import said
from llmspec.dsl.program import Program


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
        check_meshes(space.apart())
        points = undominated([space.played(c) for c in front(space, limits)])
        if not points:
            return _infeasible(program, build)
        return Front(
            points=tuple(told(space, c) for c in points),
            limits=limits,
            budget_bytes=space.budget_bytes,
        )


def why_not(program: Program, build: Build, under: Program) -> WhyNot | Infeasible:
    """Why the best plan of the program `under` some lines is not the one that the search takes.
    Errors: as of `search`, for the lines too."""
    with no_collection():
        space = Space.of(program, build)
        check_meshes(space.apart())
        chosen = completion(space)
        if chosen is None or chosen[0].times is None or chosen[1]:
            return _infeasible(program, build)
        if (under.train, under.trains) == (program.train, program.trains):
            asked = space.pinned(Pins.of(under))
        else:
            asked = Space.of(under, build)
        check_meshes(asked.apart())
        best = completion(asked)
        if best is None:
            raise no_mesh(asked.program, "no plan keeps all of these lines")
        return WhyNot(
            chosen=told(space, chosen[0]),
            other=told(asked, best[0]),
            same=_one_plan(space, chosen[0], asked, best[0]),
            late=best[1],
            budget_bytes=space.budget_bytes,
        )


def _one_plan(space: Space, found: Candidate, asked: Space, other: Candidate) -> bool:
    """Whether they are the same but for the lists that what is left open was chosen from."""
    rank = space.objective.rank
    same = said(space.home(found).program.train) == said(asked.home(other).program.train)
    return same and rank(replace(found, choice=0)) == rank(replace(other, choice=0))


def _infeasible(program: Program, build: Build) -> Infeasible:
    found = search_all(program, build)
    assert not isinstance(found, Found), "nothing was found before"
    return found
