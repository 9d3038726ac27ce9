"""What the plan predicted beside what a run measures: seconds of a step, peak of memory."""

import resource
import statistics
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from .mesh import Mesh

MOST_STEPS = 10_000  # the last ones, whose median is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """step_s: of the full batch. memory_bytes: of the fullest process, counted as
    `peak_memory_bytes` counts.
    """

    step_s: float
    memory_bytes: int


class Comparison:
    """Collects what is measured; the memory is that of steps, before anything else took some."""

    def __init__(self, predicted: Predicted):
        self.predicted = predicted
        self.seconds: deque[float] = deque(maxlen=MOST_STEPS)
        self.own_peak_bytes: int | None = None

    def step(self, seconds: float) -> None:
        """Of one step of the full batch, warm."""
        self.seconds.append(seconds)

    def interrupted(self, device: torch.device) -> None:
        """Something other than a step begins: a checkpoint, a validation, the end."""
        if self.own_peak_bytes is None:
            self.own_peak_bytes = peak_memory_bytes(device)

    def measured(self, mesh: Mesh) -> dict[str, float]:
        """Called on every rank. The median step of rank 0 and the fullest rank's memory, each
        beside its prediction; nothing of a run without a warm step.
        """
        peak = torch.tensor(float(self.own_peak_bytes or 0), dtype=torch.float64)
        peak = peak.to(mesh.device)
        if mesh.world.size > 1:
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=mesh.world.group)
        if not self.seconds:
            return {}
        return {
            "predicted_step_s": self.predicted.step_s,
            "measured_step_s": statistics.median(self.seconds),
            "predicted_memory_bytes": self.predicted.memory_bytes,
            "measured_memory_bytes": int(peak),
        }


def comparison_lines(figures: dict[str, float]) -> list[str]:
    """A table for the eye of what `Comparison.measured` gives."""
    rows = [f"{'':11}  {'predicted':>10}  {'measured':>10}"]
    for name, kind, show in (
        ("step", "step_s", _in_seconds),
        ("peak memory", "memory_bytes", _in_bytes),
    ):
        predicted, measured = figures[f"predicted_{kind}"], figures[f"measured_{kind}"]
        off = 100 * (measured / predicted - 1)
        rows.append(f"{name:11}  {show(predicted):>10}  {show(measured):>10}  {off:+.1f} %")
    return rows


def peak_memory_bytes(device: torch.device) -> int:
    """Allocated on the GPU; resident of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage counts what the process was before it became this program, too
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _in_seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"


def _in_bytes(size: float) -> str:
    return f"{size / 2**20:.0f} MiB" if size < 1000 * 2**20 else f"{size / 2**30:.2f} GiB"
