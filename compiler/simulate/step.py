"""A plan's step, played: what every pipeline rank does, waits for, and what makes it as long as it
is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from llmspec.compiler.cost.play import COMPUTE, DATA, Event, Played
from llmspec.compiler.cost.step import Times
from llmspec.compiler.forecast import Priced, priced
from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.plan import Plan
from llmspec.compiler.search.predicted import rounded
from llmspec.compiler.simulate.slices import MESSAGES, Slices
from llmspec.dsl.program import Program

AXES = ("tensor", "context", "expert", "data", MESSAGES, "offload")
"""Parts of a step that are sending, by the names of `time_s`."""


@dataclass(frozen=True, slots=True)
class RankTime:
    """Seconds of one pipeline rank's step. parts: of what it does, what data ranks reduce beside
    its computing left out; the rest of the step it waits. devices: first and last that do the
    same."""

    parts: dict[str, float]
    waits_s: float
    devices: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Simulated:
    """times: the plan's predicted step in parts, which this is. path: the critical path."""

    plan: Plan
    events: tuple[Event, ...]
    path: tuple[Event, ...]
    slices: Slices
    ranks: tuple[RankTime, ...]
    times: Times

    @property
    def step_s(self) -> float:
        return max(e.stop_s for e in self.events)

    @property
    def bubble_fraction(self) -> float:
        """The share of all ranks' time in which they wait."""
        return sum(r.waits_s for r in self.ranks) / (len(self.ranks) * self.step_s)

    def on_path(self) -> dict[str, float]:
        """Seconds of the critical path by part."""
        return _by_part(self.path, self.slices)

    def ranks_on_path(self) -> dict[int, float]:
        """Seconds of the critical path by pipeline rank."""
        spent: defaultdict[int, float] = defaultdict(float)
        for event in self.path:
            spent[event.rank] += event.spent_s
        return dict(sorted(spent.items()))


def simulate(program: Program, plan: Plan, graph: ModelGraph) -> Simulated:
    """`graph`: of the plan's micro-batch. Errors: Unsupported for what has no price yet; Refused
    when the plan's action lists wait for each other."""
    known = priced(program, plan, graph)
    step = known.step()
    played, slices = known.play(step), Slices(known, step)
    return Simulated(
        plan=plan,
        events=played.events,
        path=tuple(played.critical_path()),
        slices=slices,
        ranks=tuple(_rank(known, played, slices, rank) for rank in range(plan.mesh.pipeline)),
        times=step.times(),
    )


def _by_part(events: Iterable[Event], slices: Slices) -> dict[str, float]:
    spent: defaultdict[str, float] = defaultdict(float)
    for event in events:
        for part in slices.of(event):
            spent[part.part] += part.spent_s
    return dict(sorted(spent.items()))


def _rank(known: Priced, played: Played, slices: Slices, rank: int) -> RankTime:
    own = [e for e in played.events if e.rank == rank and e.stream in (COMPUTE, DATA)]
    spent = _by_part(own, slices)  # messages go by themselves
    hidden = played.hidden_s(rank)
    spent["data"] = spent.get("data", 0.0) - hidden
    parts = {name: seconds for name, seconds in sorted(spent.items()) if seconds > 0}
    across = known.plan.mesh.world_size // known.plan.mesh.pipeline
    return RankTime(
        parts=parts,
        waits_s=max(0.0, played.stop_s - sum(parts.values())),
        devices=(rank * across, (rank + 1) * across - 1),
    )


def simulated_object(found: Simulated) -> dict[str, Any]:
    """The object of --json; docs/json.md."""
    return {
        "schema": 1,
        "plan": found.plan.plan_hash,
        "step_time_s": rounded(found.step_s),
        "microbatches": found.plan.microbatches,
        "bubble_fraction": rounded(found.bubble_fraction),
        "time_s": _rounded(found.times.parts()),
        "exposed_s": _rounded({axis: found.times.parts()[axis] for axis in AXES}),
        "ranks": [
            {
                "pipeline_rank": rank,
                "devices": list(one.devices),
                "time_s": _rounded(one.parts),
                "waiting_s": rounded(one.waits_s),
            }
            for rank, one in enumerate(found.ranks)
        ],
        "critical_path": {
            "events": len(found.path),
            "time_s": _rounded(found.on_path()),
            "ranks_s": {str(r): rounded(s) for r, s in found.ranks_on_path().items()},
        },
    }


def _rounded(parts: dict[str, float]) -> dict[str, float]:
    return {name: rounded(seconds) for name, seconds in parts.items()}
