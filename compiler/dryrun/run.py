"""Dry run of a plan: its emitted program, at full size, as each distinct role, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmspec.compiler.driver import Session, compile_plan
from llmspec.compiler.forecast import Priced, action_lists, priced
from llmspec.compiler.plan import Plan
from llmspec.compiler.schedules import parse_action, stages_of
from llmspec.compiler.verify.run import mesh_sizes

Sent = tuple[str, int, int, int]
"""(kind, ranks of the group, bytes, how often in a step)."""

WITHIN = 0.01
"""How far the ledger's peak may be from the executed one, as a share of that."""


class RoleFailed(Exception):
    """The program raised: the message is its traceback."""


@dataclass(frozen=True, slots=True)
class Alive:
    """What one operator's line had made of what was alive at the peak."""

    operator: str
    place: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Difference:
    """A collective that the plan has `planned` times in a step and that ran `executed` times.
    places: the program's lines that sent it; units: those that the plan has it of."""

    kind: str
    ranks: int
    size_bytes: int
    planned: int
    executed: int
    places: tuple[str, ...] = ()
    units: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """One pipeline rank's first process; others of the rank do the same on equal or smaller parts.

    peak_bytes: of live tensors in a steady step, what PyTorch and NCCL need besides left out;
        peak_at: the operator that reached it; peak_place: its line. at_peak: what was alive then,
        the largest first. resting_bytes: alive between two steps.
    predicted_bytes: the ledger's peak without its fixed part and what crosses to and from the host.
    collectives: of one step; predicted_collectives: what the plan says of this rank.
    counted: micro-batches of the step that were counted like the ones before them, and did not run.
    """

    pipeline_rank: int
    peak_bytes: int
    peak_at: str
    resting_bytes: int
    predicted_bytes: int
    collectives: tuple[Sent, ...]
    predicted_collectives: tuple[Sent, ...] = ()
    peak_place: str = ""
    at_peak: tuple[Alive, ...] = ()
    places: tuple[tuple[str, int, int, tuple[str, ...]], ...] = ()
    units: tuple[tuple[str, int, int, str], ...] = ()
    counted: int = 0

    @property
    def differing(self) -> tuple[Difference, ...]:
        """Collectives that the plan and the program do not have equally often."""
        said = {sent[:3]: sent[3] for sent in self.predicted_collectives}
        done = {sent[:3]: sent[3] for sent in self.collectives}
        return tuple(
            Difference(
                *key,
                said.get(key, 0),
                done.get(key, 0),
                tuple(p for *where, places in self.places if tuple(where) == key for p in places),
                tuple(unit for *of, unit in self.units if tuple(of) == key),
            )
            for key in sorted(said.keys() | done.keys())
            if said.get(key, 0) != done.get(key, 0)
        )

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was executed."""
        return self.predicted_bytes / self.peak_bytes - 1

    @property
    def agrees(self) -> bool:
        """The plan and the program: every collective, and the peak within 1 %."""
        return not self.differing and abs(self.error) <= WITHIN


def dry_run(
    session: Session, plan: Plan, *, whole: bool = False, timeout_s: float = 3600.0
) -> tuple[Role, ...]:
    """Emit the program and execute it once for each pipeline rank that differs from the ones before
    it; the role of every rank. whole: every micro-batch runs (see folding.py).

    Errors: RoleFailed when the program raises.
    """
    known = priced(session.program, plan, session.graph(plan.microbatch))
    first = _firsts(known)
    ranks = sorted(set(first))
    with tempfile.TemporaryDirectory() as folder:
        compile_plan(session, plan, Path(folder))
        executed = zip(ranks, _executed(plan, folder, ranks, whole, timeout_s), strict=True)
        seen = {rank: _role(known, rank, one) for rank, one in executed}
    return tuple(replace(seen[one], pipeline_rank=rank) for rank, one in enumerate(first))


def _firsts(known: Priced) -> list[int]:
    """For each pipeline rank, the first one that does the same: equal stages and an equal list."""
    found: dict[object, int] = {}
    return [found.setdefault(_part(known, rank), rank) for rank in range(known.plan.mesh.pipeline)]


def _part(known: Priced, rank: int) -> object:
    count = len(known.stages)
    own = stages_of(known.schedule, rank, count, known.plan.mesh.pipeline)
    ends = [(stage == 0, stage == count - 1) for stage in own]
    actions = [parse_action(word) for word in action_lists(known.plan)[rank]]
    turns = tuple(str(a._replace(stage=own.index(a.stage))) for a in actions)
    return tuple(known.stages[stage] for stage in own), tuple(ends), turns


def _role(known: Priced, rank: int, seen: dict[str, Any]) -> Role:
    ledger, crossing = known.ledgers()[rank], known.crossing_bytes(known.holders()[rank])
    return Role(
        pipeline_rank=rank,
        peak_bytes=seen["peak_bytes"],
        peak_at=seen["peak_at"],
        peak_place=seen["peak_place"],
        at_peak=tuple(
            Alive(operator, place, dtype, tuple(shape), size)
            for operator, place, dtype, shape, size in seen["at_peak"]
        ),
        resting_bytes=seen["resting_bytes"],
        predicted_bytes=ledger.total - ledger.fixed - crossing,
        collectives=tuple(tuple(one) for one in seen["collectives"]),
        predicted_collectives=_said(known, rank),
        places=tuple((*one[:3], tuple(one[3])) for one in seen["places"]),
        units=tuple(_units(known, rank)),
        counted=seen["counted"],
    )


def _said(known: Priced, rank: int) -> tuple[Sent, ...]:
    """Whatever the axis: two of them may have groups of one size."""
    counted: Counter[tuple[str, int, int]] = Counter()
    for one in known.collectives(rank):
        counted[one["kind"], one["ranks"], one["bytes"]] += one["count"]
    return tuple((*key, often) for key, often in sorted(counted.items()) if often)


def _units(known: Priced, rank: int) -> Iterator[tuple[str, int, int, str]]:
    """(kind, ranks, bytes, unit) of what each distinct unit of a rank sends by itself."""
    instances, mesh = known.space.graph(1).instances, known.plan.mesh
    found = set()
    for stage in stages_of(known.schedule, rank, len(known.stages), mesh.pipeline):
        first, stop = known.shape.cut[stage]
        names = [instance.unit for instance in instances[first:stop]]
        for name, run in known.stages[stage].named_runs(names):
            for axis, kind, size, *_ in run.cost.sends:
                ranks = getattr(mesh, axis)
                whole = size // ranks if kind == "all_to_all" else size
                found.add((kind, ranks, whole, name))
    yield from sorted(found)


def _executed(
    plan: Plan, folder: str, ranks: Sequence[int], whole: bool, timeout_s: float
) -> list[dict[str, Any]]:
    world = plan.mesh.world_size
    across = world // plan.mesh.pipeline
    task = Path(folder) / "task.json"
    task.write_text(
        json.dumps(
            {
                "folder": folder,
                "mesh": mesh_sizes(plan),
                "ranks": [rank * across for rank in ranks],
                "world": world,
                "whole": whole,
                "jobs": min(len(ranks), len(os.sched_getaffinity(0))),
            }
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "llmspec.compiler.dryrun.role", str(task)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise RoleFailed(done.stderr)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for one in found:
        if "raised" in one:
            raise RoleFailed(one["raised"])
    return found
