"""What our search chose where a run was published (`python -m bench.searched` writes it)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results" / "searched.json"
SAME = 1e-9
"""Of a step: two sums of the same parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Searched:
    """published_s, step_s: predicted steps of the published plan and of the one that was chosen;
    None: nothing fits. seconds: of the search, on one busy core."""

    id: str
    published_s: float
    step_s: float | None
    plan: str
    considered: int
    seconds: float

    @property
    def gain(self) -> float | None:
        """By how much of the published plan's step the chosen one's is shorter."""
        return None if self.step_s is None else 1 - self.step_s / self.published_s


ABOVE: dict[str, str] = {}
"""Runs whose published plan the model prices below the chosen one, and why the search missed it."""


def read_chosen(path: Path = RESULTS) -> dict[str, Searched]:
    if not path.is_file():
        return {}
    return {values["id"]: Searched(**values) for values in json.loads(path.read_text())}
