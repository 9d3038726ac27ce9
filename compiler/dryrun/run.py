"""Dry run of a plan: its emitted program, at full size, as each distinct role, on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from llmspec.compiler.driver import Session, compile_plan
from llmspec.compiler.forecast import Priced, priced
from llmspec.compiler.plan import Plan
from llmspec.compiler.verify.run import mesh_sizes

Sent = tuple[str, int, int, int]
"""(kind, ranks of the group, bytes, how often in a step)."""


class RoleFailed(Exception):
    """The program raised: the message is its traceback."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """One pipeline rank's first process; others of the rank do the same on equal or smaller parts.

    peak_bytes: of live tensors in a steady step, what PyTorch and NCCL need besides left out;
        peak_at: the operator that reached it. resting_bytes: alive between two steps.
    predicted_bytes: the ledger's peak without its fixed part. collectives: of one step;
        predicted_collectives: what the plan says of this rank.
    """

    pipeline_rank: int
    peak_bytes: int
    peak_at: str
    resting_bytes: int
    predicted_bytes: int
    collectives: tuple[Sent, ...]
    predicted_collectives: tuple[Sent, ...] = ()

    @property
    def differing(self) -> tuple[tuple[str, int, int, int, int], ...]:
        """(kind, ranks, bytes, how often in the plan, how often executed) where these differ."""
        said = {sent[:3]: sent[3] for sent in self.predicted_collectives}
        done = {sent[:3]: sent[3] for sent in self.collectives}
        return tuple(
            (*key, said.get(key, 0), done.get(key, 0))
            for key in sorted(said.keys() | done.keys())
            if said.get(key, 0) != done.get(key, 0)
        )

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was executed."""
        return self.predicted_bytes / self.peak_bytes - 1


def dry_run(session: Session, plan: Plan, *, timeout_s: float = 3600.0) -> tuple[Role, ...]:
    """Emit the program and execute it once for each pipeline rank.

    Errors: RoleFailed when the program raises.
    """
    graph = session.graph(plan.microbatch)
    known = priced(session.program, plan, graph)
    ledgers = known.ledgers()
    across = plan.mesh.world_size // plan.mesh.pipeline
    roles = []
    with tempfile.TemporaryDirectory() as folder:
        compile_plan(session, plan, Path(folder))
        for rank in range(plan.mesh.pipeline):
            seen = _executed(plan, folder, rank * across, timeout_s)
            roles.append(
                Role(
                    pipeline_rank=rank,
                    predicted_bytes=ledgers[rank].total - ledgers[rank].fixed,
                    collectives=tuple(tuple(one) for one in seen.pop("collectives")),
                    predicted_collectives=_said(known, rank),
                    **seen,
                )
            )
    return tuple(roles)


def _said(known: Priced, rank: int) -> tuple[Sent, ...]:
    """Whatever the axis: two of them may have groups of one size."""
    counted: Counter[tuple[str, int, int]] = Counter()
    for one in known.collectives(rank):
        counted[one["kind"], one["ranks"], one["bytes"]] += one["count"]
    return tuple((*key, often) for key, often in sorted(counted.items()) if often)


def _executed(plan: Plan, folder: str, rank: int, timeout_s: float) -> dict:
    task = Path(folder) / "task.json"
    sizes, world = mesh_sizes(plan), plan.mesh.world_size
    task.write_text(json.dumps({"folder": folder, "mesh": sizes, "rank": rank, "world": world}))
    done = subprocess.run(
        [sys.executable, "-m", "llmspec.compiler.dryrun.role", str(task)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode:
        raise RoleFailed(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])
