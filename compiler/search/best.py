"""The best plan of a space, and what is told of a plan beside others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmspec.compiler.search.candidates import Candidate
from llmspec.compiler.search.explain import describe
from llmspec.compiler.search.limits import steps_of
from llmspec.compiler.search.predicted import plan_object
from llmspec.compiler.search.space import Space
from llmspec.compiler.search.walk import Walk
from llmspec.compiler.search.ways_out import without_goals


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A plan beside others. step_s, times_s: None and empty where it does not fit; run_s: None
    where the run's length is not known."""

    words: str
    decisions: dict[str, Any]
    ranks: int
    peak_bytes: int
    memory_bytes: dict[str, int]
    step_s: float | None
    times_s: dict[str, float]
    run_s: float | None


def told(space: Space, found: Candidate) -> Told:
    space = space.home(found)
    known = found.times is not None and steps_of(space.program.train) is not None
    return Told(
        words=describe(found),
        decisions=plan_object(space, found),
        ranks=found.ranks,
        peak_bytes=found.peak_bytes,
        memory_bytes=found.ledger.parts(),
        step_s=None if found.times is None else found.step_s,
        times_s={} if found.times is None else found.times.parts(),
        run_s=space.run_s(found) if known else None,
    )


def chosen_of(space: Space, walk: Walk) -> tuple[Candidate, dict[int, Candidate]]:
    """The best of the plans that are worth playing, once they have been played; and all of them, by
    the ids of those that went in."""
    pool = {id(c): c for c in [*walk.shortlist.candidates(), *walk.tally.best.values()]}
    played = {key: space.played(c) for key, c in pool.items()}
    return min(played.values(), key=space.objective.rank), played


def completion(space: Space) -> tuple[Candidate, bool] | None:
    """(the best plan under the space's lines, whether it misses the deadline or the cost); the
    smallest where none fits. None where the lines leave no plan."""
    walk = Walk(space.apart(), space.objective)
    walk.run()
    if walk.fit:
        return chosen_of(space, walk)[0], False
    if space.limits.any:
        budget = without_goals(space.program.budget, "deadline", "cost")
        found = completion(space.changed(budget=budget))
        return None if found is None else (found[0], found[0].times is not None)
    return None if walk.smallest is None else (walk.smallest, False)
