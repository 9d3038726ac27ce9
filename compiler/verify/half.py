"""Half precision: how far an emitted program may stray from float32, measured against one device.

A sharded sum is a sum in another order, so its rounding differs from one device's. What is asked is
that it is no worse: per gradient, the error against float32 in units of one device's own error.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.plan import Plan
from llmspec.compiler.verify.compare import merged, whole_norm
from llmspec.compiler.verify.run import CLIP, launch, mesh_sizes, reference_results
from llmspec.compiler.verify.worker import Task

MEDIAN, LARGEST, WHOLE = 1.3, 3.0, 2.0
FLOOR = 1e-6
"""Of all gradients' norm: both errors are at least this (a key bias has gradient zero)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """By gradient, and of all together: the program's error over the one-device program's."""

    by_name: dict[str, float]
    whole: float

    @property
    def median(self) -> float:
        return statistics.median(self.by_name.values())

    @property
    def largest(self) -> float:
        return max(self.by_name.values())

    @property
    def ok(self) -> bool:
        return self.median <= MEDIAN and self.largest <= LARGEST and self.whole <= WHOLE


def run_as_emitted(folder: str, plan: Plan, seed: int) -> list[dict[str, Any]]:
    task = Task(
        folder=folder,
        world=plan.mesh.world_size,
        mesh=mesh_sizes(plan),
        dtype=None,
        clip=CLIP,
        seed=seed,
    )
    return launch(task)


def error_ratios(
    sharded: tuple[str, Plan], single: tuple[str, Plan], graph: ModelGraph, seed: int
) -> Ratios:
    """sharded, single: (folder, plan) of the program and of its one-process form, same weights.

    graph: the reference's, for the sharded plan's micro-batches; it runs in float32.
    """
    ranks = run_as_emitted(*sharded, seed)
    alone = run_as_emitted(*single, seed)
    want = reference_results(graph, ranks, sharded[0], seed).gradients
    floor = FLOOR * float(whole_norm(want))
    errors = _errors(ranks, want)
    errors_alone = _errors(alone, want)
    return Ratios(
        by_name={n: max(errors[n], floor) / max(errors_alone[n], floor) for n in want},
        whole=math.hypot(*errors.values()) / max(math.hypot(*errors_alone.values()), floor),
    )


def _errors(ranks: list[dict[str, Any]], want: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float((value.to(torch.float64) - want[name].double()).norm())
        for name, value, _ in merged(ranks, "gradients")
    }
