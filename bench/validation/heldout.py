"""The one constant taken from published steps, estimated without each source in turn.

`sustained` scales every rate of kernels: what a step computes, its optimizer and waiting for other
stages' kernels go with its inverse, what it sends does not. That is exact but for what computing
hides of it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.validation.compared import Compared, by_family, counted, percentile
from llmspec.compiler.cost.hardware import GPU_CONSTANTS

SCALED = ("compute", "optimizer", "pipeline_bubble")
"""Parts of a step that are kernels' time, or other stages'."""
GRID = [0.85 + 0.005 * i for i in range(31)]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """sustained: as the other sources say; median, tail: errors of `source` priced with it."""

    source: str
    sustained: float
    median: float
    tail: float


def scaled_s(time_s: Mapping[str, float], share: float) -> float:
    """A step's seconds, had kernels kept `share` of their rates."""
    change = GPU_CONSTANTS["sustained"] / share
    return sum(s * (change if part in SCALED else 1.0) for part, s in time_s.items())


def errors(ones: Iterable[Compared], share: float) -> list[float]:
    return [
        abs(scaled_s(o.priced.time_s, share) / o.row.step_s - 1)
        for o in ones
        if o.ratio is not None and o.row.step_s is not None
    ]


def estimate(sources: Iterable[Sequence[Compared]]) -> float:
    """With the least median error, averaged over sources."""
    ones = list(sources)
    return min(GRID, key=lambda s: sum(statistics.median(errors(one, s)) for one in ones))


def held_out(compared: Sequence[Compared]) -> list[HeldOut]:
    families, found = by_family(counted(compared)), []
    for name, ones in families.items():
        share = estimate(others for other, others in families.items() if other != name)
        off = errors(ones, share)
        found.append(HeldOut(name, share, statistics.median(off), percentile(off, 0.9)))
    return found
