"""Every way to have at most two choices of what to compute again for each unit's blocks of one
stage, the fastest first."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from llmspec.compiler.cost.moments import fullest_of
from llmspec.compiler.cost.recompute import Again, Operators

Chosen = tuple[Operators, ...]
"""What each instance of a stretch of the chain computes again."""
TRIES = 64
"""Mixtures whose ledger is worked out before a stage counts as one that nothing makes fit."""

SOME = 128
"""Mixtures that are looked at before all others are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Of a stage. away: what blocks keep waits in host memory. in_order: no unit's blocks stand
    between another's. coming, cast: bytes of each gradient that comes while one block goes
    backward, and of each weight that its uses cast."""

    away: bool = False
    in_order: bool = True
    coming: int = 0
    cast: int = 0

    def going(self, again: Again) -> int:
        """The most bytes beside what a block keeps while it goes backward."""
        return again.working_bytes + fullest_of(again.moments, self.coming, self.cast)


@dataclass(frozen=True, slots=True)
class Choices:
    """Of one unit's `count` blocks in a stage, with the bytes of its cast weights."""

    unit: str
    count: int
    found: list[Again]
    cast_bytes: int

    def kept(self, again: Again) -> int:
        return again.kept_bytes + (self.cast_bytes if again.keeps_casts else 0)

    def returning(self, again: Again, kind: Kind) -> int:
        return kind.going(again) + (0 if again.keeps_casts else self.cast_bytes)

    def worthwhile(self) -> list[Again]:
        """Those that no other beats, from the most bytes kept to the fewest."""
        out: list[Again] = []
        order = sorted(self.found, key=lambda a: (self.kept(a), a.whole_s, a.working_bytes))
        for one in order:
            if not out or one.whole_s < out[-1].whole_s:
                out.append(one)
        return out[::-1]


@dataclass(frozen=True, slots=True)
class Split:
    """The first `count` of one unit's blocks compute `first` again, the others `rest`."""

    first: Operators
    count: int
    rest: Operators


@dataclass(frozen=True, slots=True)
class _Table:
    """Mixtures: seconds and bytes of one micro-batch that stay on the device. rows: of each unit,
    the places of its choices for the first and the other blocks, and how many the first are."""

    seconds: np.ndarray
    kept: np.ndarray
    rows: np.ndarray

    def take(self, order: np.ndarray) -> _Table:
        return _Table(self.seconds[order], self.kept[order], self.rows[order])

    def times(self, other: _Table) -> _Table:
        seconds = (self.seconds[:, None] + other.seconds[None, :]).ravel()
        kept = (self.kept[:, None] + other.kept[None, :]).ravel()
        left = np.repeat(self.rows, len(other.rows), axis=0)
        right = np.tile(other.rows, (len(self.rows), 1, 1))
        return _Table(seconds, kept, np.concatenate([left, right], axis=1))

    def not_beaten(self) -> _Table:
        """The fewest bytes at each time."""
        order = np.lexsort((self.kept, self.seconds))
        kept = self.kept[order]
        least = np.minimum.accumulate(kept)
        return self.take(order[np.concatenate([[True], kept[1:] < least[:-1]])])


Rooms = tuple[np.ndarray | float, np.ndarray | float]
"""Of a unit's blocks, in the chain's order: the most bytes that may be kept in the last micro-batch
as each goes backward, what it computes again among them, and when it is through."""


class _Unit:
    """One unit's blocks. kept, away, back: of a block by choice, bytes that stay on the device,
    those that wait in host memory, and the most beyond them as it goes backward."""

    def __init__(self, own: Choices, found: list[Again], kind: Kind):
        self.name, self.count = own.unit, own.count
        self.seconds = np.array([a.whole_s for a in found])
        self.away = np.array([a.away_bytes if kind.away else 0 for a in found], dtype=float)
        self.kept = np.array([own.kept(a) for a in found], dtype=float) - self.away
        self.back = np.array([own.returning(a, kind) for a in found]) + self.away

    def table(self) -> _Table:
        places, count = np.arange(len(self.kept)), np.arange(self.count)
        more, less, first = np.meshgrid(places, places, count)
        # the same for all is one choice, with none of it first
        open_ = ((less > more) & (first > 0)) | ((less == more) & (first == 0))
        more, less, first = more[open_], less[open_], first[open_]
        rest = self.count - first
        return _Table(
            first * self.seconds[less] + rest * self.seconds[more],
            first * self.kept[less] + rest * self.kept[more],
            np.stack([less, first, more], axis=1)[:, None, :],
        )

    def most(self, rows: np.ndarray, rooms: Rooms = (0.0, 0.0)) -> np.ndarray:
        """By mixture: the most bytes beyond the room that each block has, as they go backward. As
        one does, the one before it comes back from host memory."""
        less, first, more = rows.T
        blocks, kept = np.arange(self.count + 1), self.kept[:, None]
        comes = np.where(blocks[:-1] > 0, self.away[:, None], 0.0)
        alive = np.maximum(
            blocks[1:] * kept + self.back[:, None] - rooms[0], blocks[:-1] * kept - rooms[1]
        )
        # of a choice: as any block before one goes backward, and as any from it on does
        before = np.maximum.accumulate(alive + comes, axis=1)
        after = np.full((len(kept), self.count + 1), -math.inf)
        after[:, :-1] = np.maximum.accumulate((alive + comes)[:, ::-1], axis=1)[:, ::-1]
        at_first = alive[more, first] + np.where(first > 0, self.away[less], 0.0)
        rest = np.maximum(after[more, first + 1], at_first)
        rest += first * (self.kept[less] - self.kept[more])
        return np.where(first > 0, np.maximum(rest, before[less, first - 1]), rest)


def _least(found: Sequence[Again], kind: Kind) -> Again:
    """What no choice has fewer bytes than, wherever these are: it bounds every mixture's ledger."""
    away = min(a.away_bytes for a in found)
    return Again(
        kept_bytes=away + min(a.kept_bytes - a.away_bytes for a in found),
        away_bytes=away,
        keeps_casts=all(a.keeps_casts for a in found),
        working_bytes=min(map(kind.going, found)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """in_flight: micro-batches, that keep at most kept_bytes. rooms: by unit; none: no limit."""

    in_flight: float
    kept_bytes: float = math.inf
    rooms: Mapping[str, Rooms] = field(default_factory=dict)

    def over(self, table: _Table, units: Sequence[_Unit]) -> np.ndarray:
        """By how much mixtures of these units' blocks exceed the rooms at the least, the earlier
        micro-batches' counted."""
        earlier = (self.in_flight - 1) * table.kept
        if not self.rooms:
            return np.full_like(earlier, -math.inf)
        if len(units) == 1:
            return earlier + units[0].most(table.rows[:, 0], self.rooms[units[0].name])
        return earlier + table.kept - max(np.max(self.rooms[unit.name][0]) for unit in units)


class _Alone:
    """The mixtures of one unit's blocks, the fastest first."""

    def __init__(self, unit: _Unit):
        self.unit, table = unit, unit.table()
        most = unit.most(table.rows[:, 0])
        self.table = table.take(np.lexsort((most, table.kept, table.seconds)))

    def within(self, limits: Limits) -> Iterator[tuple[float, np.ndarray]]:
        """Seconds and rows of those that may fit."""
        places = np.flatnonzero(limits.in_flight * self.table.kept <= limits.kept_bytes)
        start, size = 0, SOME
        while start < len(places):
            # the first few are nearly always enough
            table = self.table.take(places[start : start + size])
            for place in np.flatnonzero(limits.over(table, [self.unit]) <= 0):
                yield table.seconds[place], table.rows[place]
            start, size = start + size, len(places)


class _Pairs:
    """Those of several units: each of the earlier ones' with each of the last one's, never written
    down all. Of both, what is slower keeps less."""

    def __init__(self, units: Sequence[_Unit], *, in_order: bool):
        *first, last = units
        self.units = (first, [last]) if in_order else (units, units)
        self.earlier, self.last = first[0].table().not_beaten(), last.table().not_beaten()
        for unit in first[1:]:
            self.earlier = self.earlier.times(unit.table().not_beaten()).not_beaten()
        self.seconds = self.earlier.seconds.tolist(), self.last.seconds.tolist()
        self.kept = self.earlier.kept.tolist(), self.last.kept.tolist()

    def within(self, limits: Limits) -> Iterator[tuple[float, np.ndarray]]:
        """As of one unit: for each of the earlier mixtures the last ones from the first that may
        fit on, merged."""
        over = limits.over(self.last, self.units[1])
        room = -limits.in_flight * self.earlier.kept
        starts = np.searchsorted(-self.last.kept, -self._least_room(limits)).tolist()
        heap = [self._place(i, j) for i, j in enumerate(starts) if j < len(over)]
        heapq.heapify(heap)
        while heap:
            spent, _, i, j = heap[0]
            if over[j] <= room[i]:
                yield spent, np.concatenate([self.earlier.rows[i], self.last.rows[j]])
            fits = over[j + 1 :] <= room[i]
            if fits.any():
                heapq.heapreplace(heap, self._place(i, j + 1 + int(fits.argmax())))
            else:
                heapq.heappop(heap)

    def _place(self, i: int, j: int) -> tuple[float, float, int, int]:
        (seconds, later_s), (kept, later) = self.seconds, self.kept
        return seconds[i] + later_s[j], kept[i] + later[j], i, j

    def _least_room(self, limits: Limits) -> np.ndarray:
        """By earlier mixture: what the last one's may keep."""
        n = limits.in_flight
        whole = limits.kept_bytes / n if n else np.inf
        over = limits.over(self.earlier, self.units[0])
        if n <= 1:
            return np.where(over <= 0, whole - self.earlier.kept, -1.0)
        return np.minimum(whole - self.earlier.kept, -over / (n - 1))


class Mixtures:
    """Of one stage. Of each unit's blocks the earlier ones keep less: what they compute again is
    back when the later ones are gone."""

    def __init__(self, units: tuple[Choices, ...], kind: Kind):
        self.units = tuple(u.unit for u in units)
        self.found = [own.worthwhile() for own in units]
        self.least = {u: _least(f, kind) for u, f in zip(self.units, self.found, strict=True)}
        blocks = [_Unit(own, found, kind) for own, found in zip(units, self.found, strict=True)]
        several = len(blocks) > 1
        self.ways = _Pairs(blocks, in_order=kind.in_order) if several else _Alone(blocks[0])

    def within(self, limits: Limits, *, some: bool) -> Iterator[tuple[Split, ...]]:
        """Those that may fit, the fastest first. `some`: something must run again."""
        for seconds, row in islice(self.ways.within(limits), TRIES + 1):
            if not (some and seconds == 0.0):
                yield self._splits(row)

    def _splits(self, row: np.ndarray) -> tuple[Split, ...]:
        return tuple(
            Split(found[less].operators, int(first), found[more].operators)
            for found, (less, first, more) in zip(self.found, row, strict=True)
        )

    def spread(self, splits: Sequence[Split], names: Sequence[str]) -> Chosen:
        """The choice of each of a stage's instances, `names` their units; "" for what stands
        alone."""
        by_unit = dict(zip(self.units, splits, strict=True))
        seen = dict.fromkeys(self.units, 0)
        out: list[Operators] = []
        for name in names:
            if name not in by_unit:
                out.append(())
                continue
            split = by_unit[name]
            out.append(split.first if seen[name] < split.count else split.rest)
            seen[name] += 1
        return tuple(out)
