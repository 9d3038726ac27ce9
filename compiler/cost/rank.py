"""What one pipeline rank runs and holds: several stages, backwards in two parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmspec.compiler.cost.memory import Residence
from llmspec.compiler.cost.stage import Stage, together
from llmspec.compiler.orders import Schedule, stages_of
from llmspec.compiler.schedules import Held, held_at_once


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A rank as the ledger sees it. stage: all that it runs. The rest: see Residence."""

    stage: Stage
    in_flight: float
    message_bytes: int
    sends_on: bool
    receives: bool
    split: bool
    awaited: tuple[int, int] = (0, 0)
    forwards: float = 1.0

    def home(self, plain: Residence) -> Residence:
        return replace(
            plain,
            in_flight=self.in_flight,
            message_bytes=self.message_bytes,
            sends_on=self.sends_on,
            receives=self.receives,
            split=self.split,
            awaited=self.awaited,
            forwards=self.forwards,
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
) -> list[Holder]:
    """Of every rank. cast_bytes: of each weight element that autograd keeps as its use casts it.
    sum_bytes: of each whose gradient stays whole from the first backward on; 0: none does."""
    held = held_at_once(schedule, len(stages), ranks, microbatches)
    return [
        _holder(
            schedule,
            stages,
            stages_of(schedule, rank, len(stages), ranks),
            mine,
            cast_bytes,
            sum_bytes,
        )
        for rank, mine in enumerate(held)
    ]


def _holder(
    schedule: Schedule,
    stages: Sequence[Stage],
    own: tuple[int, ...],
    moments: Sequence[Held],
    cast_bytes: int,
    sum_bytes: int,
) -> Holder:
    last = len(stages) - 1
    message = stages[0].output_bytes if last else 0
    kept = [stages[s].kept_bytes(cast_bytes) for s in own]
    late = [stages[s].late_bytes for s in own]
    # a result that another rank gets stays for its backward
    sent = [stages[s].output_bytes if s < last and s + 1 not in own else 0 for s in own]
    alive = [k + s for k, s in zip(kept, sent, strict=True)]
    elements = [stages[s].elements for s in own]
    sizes = [
        (
            _bytes(held, alive, late),
            message * held.messages,
            sum_bytes * sum(n for n, came in zip(elements, held.summed, strict=True) if came),
        )
        for held in moments
    ]
    (size, messages, _), then = max(zip(sizes, moments, strict=True), key=lambda both: sum(both[0]))
    awaited = [s for s, came in zip(own, then.summed, strict=True) if not came and sum_bytes]
    alone = len(own) == 1 and not schedule.splits
    return Holder(
        stage=together([stages[s] for s in own]),
        # else in units of what one micro-batch keeps on all stages: by that the ledger multiplies
        in_flight=then.forwards[0] if alone else size / max(sum(kept), 1),
        message_bytes=messages,
        sends_on=alone and own[0] < last,
        receives=own[0] > 0,
        split=schedule.splits,
        awaited=(
            sum(stages[s].elements for s in awaited),
            sum(stages[s].expert_elements for s in awaited),
        ),
        forwards=_forwards(moments, [stages[s].away_host_bytes for s in own]),
    )


def _forwards(moments: Sequence[Held], sizes: Sequence[int]) -> float:
    """The most that wait for their backward, in units of one on all stages. `sizes`: of each."""
    most = max(sum(n * s for n, s in zip(held.forwards, sizes, strict=True)) for held in moments)
    return most / max(sum(sizes), 1)


def _bytes(held: Held, alive: Sequence[int], late: Sequence[int]) -> int:
    forwards = sum(n * size for n, size in zip(held.forwards, alive, strict=True))
    return forwards + sum(n * size for n, size in zip(held.late, late, strict=True))


def fullest(found: Sequence[Holder], microbatches: int) -> list[Holder]:
    """Of ranks that run equal stages, the one that holds most: of those that have all micro-batches
    in flight at once, which find no gradients yet, and of the others. `forwards` is what any of
    those equals has."""
    by_stages: dict[tuple[Stage, bool, bool, bool, tuple[int, int]], Holder] = {}
    for holder in found:
        every = holder.in_flight >= microbatches
        key = (holder.stage, holder.sends_on, holder.receives, every, holder.awaited)
        known = by_stages.setdefault(key, holder)
        most = max(known.forwards, holder.forwards)
        fuller = holder if holder.in_flight > known.in_flight else known
        by_stages[key] = replace(fuller, forwards=most)
    return list(by_stages.values())
