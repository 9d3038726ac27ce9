"""Predictions beside what was published, and the statistics of both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bench.validation.price import Priced
from bench.validation.rows import FAMILIES, Row
from bench.validation.set_aside import reason

GIB = 2**30
WIDER = 0.05
RESERVED = 1.05
"""What PyTorch's allocator has of the device over what it has handed out: the median of thirteen
peaks of Megatron that SimuMax prints both of (1.03 to 1.08). nvidia-smi sees that."""


@dataclass(frozen=True, slots=True)
class Compared:
    row: Row
    priced: Priced

    @property
    def ratio(self) -> float | None:
        """Predicted over published step."""
        if self.priced.step_s is None or self.row.step_s is None:
            return None
        return self.priced.step_s / self.row.step_s

    @property
    def aside(self) -> str | None:
        """Why statistics leave it out."""
        return reason(self.row) if self.ratio is not None else None

    @property
    def read_gib(self) -> float | None:
        """What the source's instrument would show of the predicted peak."""
        if self.priced.peak_bytes is None:
            return None
        fixed, kind = self.priced.memory_bytes["fixed"], self.row.peak_kind or ""
        allocated = (self.priced.peak_bytes - fixed) / GIB
        if "nvidia-smi" in kind:
            return RESERVED * allocated + fixed / GIB
        inside = "max_memory_allocated" in kind or "XLA" in kind
        return allocated if inside else allocated + fixed / GIB

    @property
    def memory_ratio(self) -> float | None:
        read = self.read_gib
        if read is None or self.row.peak_gib is None:
            return None
        return read / (sum(self.row.peak_gib) / 2)

    @property
    def memory_inside(self) -> bool:
        """The printed interval, 5 % wider each way."""
        assert self.row.peak_gib is not None and self.read_gib is not None
        low, high = self.row.peak_gib
        return (1 - WIDER) * low <= self.read_gib <= (1 + WIDER) * high

    @property
    def missing(self) -> str | None:
        """Why there is no comparison of times."""
        if self.priced.reason is None and self.row.step_s is None:
            return "the source has no time"
        return self.priced.reason

    @property
    def rejected(self) -> bool:
        """The published plan ran, and we would say that it does not fit."""
        priced = self.priced
        return None not in (priced.peak_bytes, priced.usable_bytes) and (
            (priced.peak_bytes or 0) > (priced.usable_bytes or 0)
        )


def counted(compared: Iterable[Compared]) -> list[Compared]:
    """Those with a comparison of times that statistics do not leave out."""
    return [o for o in compared if o.ratio is not None and o.aside is None]


def compare(rows: Sequence[Row], priced: Mapping[str, Priced]) -> list[Compared]:
    return [Compared(row, priced[row.id]) for row in rows]


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank: the least value that so many of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spearman(pairs: Sequence[tuple[float, float]]) -> float:
    """Pearson's correlation of the ranks; ties share their mean rank."""
    first, second = (_ranks([p[i] for p in pairs]) for i in (0, 1))
    return statistics.correlation(first, second)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]


def by_family(compared: Iterable[Compared]) -> dict[str, list[Compared]]:
    found: dict[str, list[Compared]] = {name: [] for name in FAMILIES.values()}
    for one in compared:
        found[one.row.family].append(one)
    return {name: ones for name, ones in found.items() if ones}
