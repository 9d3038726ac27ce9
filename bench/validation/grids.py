"""Grids: runs of one model whose settings a source varied, and which of them is the fastest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.validation.compared import Compared

FEWEST = 3
"""Runs that make a grid."""
NEAR = 0.05


@dataclass(frozen=True, slots=True)
class Grid:
    """first: the run that is priced fastest; fastest: the one that was."""

    what: str
    runs: int
    first: Compared
    fastest: Compared

    @property
    def lost(self) -> float:
        """By how much the run priced fastest is slower than the fastest."""
        return _rate(self.fastest) / _rate(self.first) - 1


def _rate(one: Compared) -> float:
    assert one.row.tokens_per_s is not None
    return one.row.tokens_per_s


def _priced_rate(one: Compared) -> float:
    assert one.ratio is not None
    return _rate(one) / one.ratio


def grids(compared: Iterable[Compared]) -> list[Grid]:
    """Of BigScience: one model, batch and cluster under several plans. Of llm-foundry, which has a
    plan for each: one model on one kind of GPU, its sequences, batches and numbers of GPUs."""
    groups: dict[tuple[object, ...], list[Compared]] = {}
    for one in compared:
        if one.ratio is None or one.row.family not in ("BigScience", "llm-foundry"):
            continue
        row = one.row
        key = row.model_key if row.family == "BigScience" else (_size(one), row.gpu)
        groups.setdefault((row.family, *key), []).append(one)
    found = []
    for ones in groups.values():
        if len(ones) < FEWEST:
            continue
        row = ones[0].row
        what = f"{row.family}: {row.model['family']}, {row.size('heads')} heads, batch {row.batch}"
        if row.family == "llm-foundry":
            what = f"{row.family}: {_size(ones[0])}, {row.gpu}"
        first, fastest = max(ones, key=_priced_rate), max(ones, key=_rate)
        found.append(Grid(what, len(ones), first, fastest))
    return found


def _size(one: Compared) -> str:
    return str(one.row.model["family"]).partition(" ")[0]
