"""What one pipeline rank runs and holds: several stages, backwards in two parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from llmspec.compiler.cost.residence import Residence, Turn
from llmspec.compiler.cost.stage import Stage, together
from llmspec.compiler.orders import Schedule, stages_of
from llmspec.compiler.schedules import ALL, Held, held_at_once


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A rank as the ledger sees it. stage: all that it runs. moments: of several stages or a split
    backward, each of which may be the fullest, with the bytes that are kept; message: bytes of one;
    first: the one that holds most, of those in which blocks compute again; besides: at that one,
    bytes for other ranks and for second parts. The rest: see Residence."""

    stage: Stage
    in_flight: float
    message_bytes: int
    sends_on: bool
    receives: bool
    split: bool
    awaited: tuple[int, int] = (0, 0)
    forwards: float = 1.0
    first: Turn | None = None
    moments: Sequence[tuple[Held, int]] = ()
    message: int = 0
    sends: tuple[bool, ...] = ()
    besides: int = 0

    @cached_property
    def turns(self) -> tuple[Turn, ...]:
        if self.first is None:
            return ()
        every = (Turn(held, self.message * held.messages, kept) for held, kept in self.moments)
        return tuple(_not_exceeded(self.first, every))

    def home(
        self,
        plain: Residence,
        *,
        turns: tuple[Turn, ...] | None = None,
    ) -> Residence:
        """With what is given in place of its own."""
        return replace(
            plain,
            in_flight=self.in_flight,
            message_bytes=self.message_bytes,
            sends_on=self.sends_on,
            receives=self.receives,
            split=self.split,
            awaited=self.awaited,
            forwards=self.forwards,
            turns=self.turns if turns is None else turns,
            sends=self.sends,
        )


def run_by_ranks(schedule: Schedule, stages: Sequence[Stage], ranks: int) -> list[Stage]:
    """What each rank runs, as one stage."""
    made: dict[tuple[int, ...], Stage] = {}
    found = []
    for rank in range(ranks):
        own = [stages[s] for s in stages_of(schedule, rank, len(stages), ranks)]
        found.append(made.setdefault(tuple(map(id, own)), together(own)))
    return found


def holders(
    schedule: Schedule,
    stages: Sequence[Stage],
    ranks: int,
    microbatches: int,
    cast_bytes: int = 0,
    sum_bytes: int = 0,
    *,
    away: bool = False,
) -> list[Holder]:
    """Of every rank. cast_bytes: of each weight element that autograd keeps as its use casts it.
    sum_bytes: of each whose gradient stays whole from the first backward on; 0: none does.
    away: what autograd keeps waits in host memory, where it can."""
    sizes = [
        _Sizes(
            stage.kept_bytes(cast_bytes) - (stage.away_bytes if away else 0),
            stage.late_bytes,
            stage.output_bytes,
            stage.left_input_bytes if away and number else 0,
            sum_bytes * stage.elements,
            stage.away_host_bytes,
        )
        for number, stage in enumerate(stages)
    ]
    tables = _tables(schedule, len(stages), ranks, microbatches)
    return [
        _holder(schedule, stages, sizes, stages_of(schedule, rank, len(stages), ranks), table)
        for rank, table in enumerate(tables)
    ]


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of one stage: of one micro-batch until its backward, from its first to its second part,
    of its result, of its input beside what it keeps, what it has in host memory; and of all
    gradients that stay."""

    kept: int
    late: int
    output: int
    input: int
    sums: int
    away: int


@dataclass(frozen=True, slots=True)
class _Table:
    """The moments of a rank, and as rows their forwards, late ones, gradients that have all come,
    messages; first_parts: the places of those that are not a second part."""

    moments: tuple[Held, ...]
    rows: np.ndarray
    first_parts: np.ndarray


@lru_cache(maxsize=4096)
def _tables(schedule: Schedule, stages: int, ranks: int, microbatches: int) -> tuple[_Table, ...]:
    held = held_at_once(schedule, stages, ranks, microbatches)
    return tuple(
        _Table(
            moments,
            np.array([_row(one) for one in moments]),
            np.flatnonzero([one.kind != "W" for one in moments]),
        )
        for moments in held
    )


def held_bytes(
    schedule: Schedule, stages: Sequence[Stage], kept: Sequence[int], ranks: int, microbatches: int
) -> list[int]:
    """By rank: the most bytes of micro-batches in flight, with messages and what waits for second
    parts. kept: by stage, what autograd keeps of one."""
    last = len(stages) - 1
    message = stages[0].output_bytes if last else 0
    found = []
    for rank, table in enumerate(_tables(schedule, len(stages), ranks, microbatches)):
        own = stages_of(schedule, rank, len(stages), ranks)
        sent = [stages[s].output_bytes if s < last and s + 1 not in own else 0 for s in own]
        alive = [kept[s] + more for s, more in zip(own, sent, strict=True)]
        late = [stages[s].late_bytes for s in own]
        held = table.rows[table.first_parts] @ np.array([*alive, *late, *[0] * len(own), message])
        found.append(int(held.max()))
    return found


def _row(held: Held) -> tuple[int, ...]:
    return (*held.forwards, *held.late, *(come == ALL for come in held.come), held.messages)


def _holder(
    schedule: Schedule,
    stages: Sequence[Stage],
    sizes: Sequence[_Sizes],
    own: tuple[int, ...],
    table: _Table,
) -> Holder:
    last = len(stages) - 1
    message = stages[0].output_bytes if last else 0
    mine = [sizes[s] for s in own]
    # a result that another rank gets stays for its backward
    sends = tuple(s < last and s + 1 not in own for s in own)
    sent = [size.output if there else 0 for size, there in zip(mine, sends, strict=True)]
    sent = [more + size.input for size, more in zip(mine, sent, strict=True)]
    late, sums = [size.late for size in mine], [size.sums for size in mine]
    alive = [size.kept + more for size, more in zip(mine, sent, strict=True)]
    held = table.rows @ np.array([*alive, *late, *[0] * len(own), 0])
    whole = held + table.rows @ np.array([*[0] * 2 * len(own), *sums, message])
    place = int(table.first_parts[np.argmax(whole[table.first_parts])])
    then, kept = table.moments[place], int(held[place])
    awaited = [s for s, come in zip(own, then.come, strict=True) if come != ALL and sizes[s].sums]
    alone = len(own) == 1 and not schedule.splits
    return Holder(
        stage=together([stages[s] for s in own]),
        # else in units of what one micro-batch keeps on all stages
        in_flight=then.forwards[0] if alone else kept / max(sum(size.kept for size in mine), 1),
        message_bytes=message * then.messages,
        sends_on=alone and own[0] < last,
        receives=own[0] > 0,
        split=schedule.splits,
        awaited=(
            sum(stages[s].elements for s in awaited),
            sum(stages[s].expert_elements for s in awaited),
        ),
        forwards=_forwards(table, [size.away for size in mine]),
        first=None if alone else Turn(then, message * then.messages, kept),
        moments=() if alone else list(zip(table.moments, held.tolist(), strict=True)),
        message=message,
        sends=sends,
        besides=_bytes(then, sent, late),
    )


def _not_exceeded(first: Turn, turns: Iterable[Turn]) -> list[Turn]:
    """`first`, and of the others those that none exceeds."""
    most: dict[tuple[object, ...], Turn] = {}
    for turn in (first, *turns):
        held = turn.held
        key = held.runs, held.kind, held.come, held.early, held.done
        if key not in most or not most[key].exceeds(turn):
            most[key] = turn
    found = [first]
    for turn in most.values():
        if not any(other.exceeds(turn) for other in found):
            found = [first, *(one for one in found[1:] if not turn.exceeds(one)), turn]
    return found


def _forwards(table: _Table, away: Sequence[int]) -> float:
    """The most that wait for their backward, in units of one on all stages. `away`: bytes of each
    stage in host memory."""
    most = int((table.rows[:, : len(away)] @ np.array(away)).max())
    return most / max(sum(away), 1)


def _bytes(held: Held, alive: Sequence[int], late: Sequence[int]) -> int:
    forwards = sum(n * size for n, size in zip(held.forwards, alive, strict=True))
    return forwards + sum(n * size for n, size in zip(held.late, late, strict=True))


def fullest(found: Sequence[Holder], microbatches: int) -> list[Holder]:
    """Of ranks that run equal stages, those of which any may hold most: where all micro-batches are
    in flight at once no gradients are there yet, and of several stages each may be the fullest.
    `forwards` is what any of those equals has."""
    by_stages: dict[tuple[Stage, bool, bool, bool, tuple[int, int]], list[Holder]] = {}
    for holder in found:
        every = holder.first is None and holder.in_flight >= microbatches
        awaited = (0, 0) if holder.first is not None else holder.awaited
        key = (holder.stage, holder.sends_on, holder.receives, every, awaited)
        known = by_stages.setdefault(key, [])
        most = max(one.forwards for one in (holder, *known))
        if not any(_exceeds(other, holder) for other in known):
            known[:] = [*(other for other in known if not _exceeds(holder, other)), holder]
        known[:] = [one if one.forwards == most else replace(one, forwards=most) for one in known]
    return [holder for known in by_stages.values() for holder in known]


def _exceeds(one: Holder, other: Holder) -> bool:
    """Whether of equal stages the first holds no less at any moment."""
    if one.first is None:
        return one.in_flight >= other.in_flight
    return all(any(mine.exceeds(its) for mine in one.turns) for its in other.turns)
