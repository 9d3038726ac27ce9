"""Dry run of a plan: its emitted program, at full size, as each distinct role, on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from llmspec.compiler.driver import Session, compile_plan
from llmspec.compiler.forecast import forecast
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
    predicted_bytes: the ledger's peak without its fixed part.
    """

    pipeline_rank: int
    peak_bytes: int
    peak_at: str
    resting_bytes: int
    predicted_bytes: int
    collectives: tuple[Sent, ...]

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was executed."""
        return self.predicted_bytes / self.peak_bytes - 1


def dry_run(session: Session, plan: Plan, *, timeout_s: float = 3600.0) -> tuple[Role, ...]:
    """Emit the program and execute it once for each pipeline rank.

    Errors: RoleFailed when the program raises.
    """
    known = forecast(session.program, plan, session.graph(plan.microbatch))
    fixed = [stage.memory.total - stage.memory.fixed for stage in known.stages]
    across = plan.mesh.world_size // plan.mesh.pipeline
    roles = []
    with tempfile.TemporaryDirectory() as folder:
        compile_plan(session, plan, Path(folder))
        for rank in range(plan.mesh.pipeline):
            seen = _executed(plan, folder, rank * across, timeout_s)
            roles.append(
                Role(
                    pipeline_rank=rank,
                    predicted_bytes=max(fixed[rank :: plan.mesh.pipeline]),
                    collectives=tuple(tuple(one) for one in seen.pop("collectives")),
                    **seen,
                )
            )
    return tuple(roles)


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
