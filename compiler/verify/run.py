"""Run an emitted directory on local processes and compare it with the reference."""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
from pathlib import Path
from typing import Any

import torch

from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.plan import Plan
from llmspec.compiler.verify.compare import (
    FLOAT64,
    Expected,
    Report,
    Tolerance,
    compare,
    emitted_masks,
    expected,
)
from llmspec.compiler.verify.worker import Task, run_rank

CLIP = 0.1
"""Small enough that the gradients of every model are clipped."""

AXES = ("pipeline", "replicas", "shards", "context", "expert", "tensor")


MEMORY = (
    "is there memory for it? A model from PyTorch is verified at its own size, "
    "so give it smaller arguments"
)


class ProcessFailed(Exception):
    """A rank raised: the message is its traceback."""


def launch(task: Task, timeout_s: float = 300.0) -> list[dict[str, Any]]:
    """Run every rank in a forked process; what each saved, in rank order.

    Errors: ProcessFailed with the first traceback, or when ranks do not end in time.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            fork.Process(target=run_rank, args=(task, r, f"{folder}/store", folder))
            for r in range(task.world)
        ]
        for process in ranks:
            process.start()
        try:
            for process in ranks:
                process.join(timeout_s)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
        killed = [(r, p.exitcode) for r, p in enumerate(ranks) if (p.exitcode or 0) < 0]
        if killed:
            rank, number = killed[0]
            name = signal.Signals(-(number or 0)).name
            raise ProcessFailed(f"process {rank} was ended by {name}: {MEMORY}")
        errors = sorted(Path(folder).glob("rank*.error"))
        if errors:
            raise ProcessFailed(_first_cause([e.read_text() for e in errors]))
        if any(not Path(f"{folder}/rank{r}.pt").exists() for r in range(task.world)):
            raise ProcessFailed(f"a rank did not end within {timeout_s:.0f} s")
        return [torch.load(f"{folder}/rank{r}.pt") for r in range(task.world)]


def _first_cause(errors: list[str]) -> str:
    """A lost connection is the echo of another rank's fault."""
    echo = ("Connection closed by peer", "Connection reset", "Broken pipe")
    real = [e for e in errors if not any(word in e for word in echo)]
    return (real or errors)[0]


def mesh_sizes(plan: Plan) -> dict[str, int]:
    return {axis: getattr(plan.mesh, axis) for axis in AXES}


def reference_results(
    graph: ModelGraph, ranks: list[dict[str, Any]], folder: str, seed: int
) -> Expected:
    parameters = {n: v for r in ranks for n, v in r["parameters"].items()}
    masks = emitted_masks(folder, seed) if graph.dropout else None
    return expected(graph, parameters, ranks[0]["tokens"], masks=masks, clip=CLIP)


def verify_folder(
    folder: str,
    graph: ModelGraph,
    plan: Plan,
    *,
    seed: int,
    dtype: torch.dtype = torch.float64,
    tolerance: Tolerance = FLOAT64,
    rows: int | None = None,
) -> Report:
    """Compare one step of the program in `folder` with the reference of `graph`.

    rows: sequences of the step, one of the sizes that the batch has while it grows; None: the last.
    Errors: ProcessFailed when a rank raises.
    """
    world = plan.mesh.world_size
    task = Task(
        folder=folder,
        world=world,
        mesh=mesh_sizes(plan),
        dtype=dtype,
        clip=CLIP,
        seed=seed,
        rows=rows,
    )
    ranks = launch(task)
    return compare(ranks, reference_results(graph, ranks, folder, seed), tolerance)
