"""The length of a pipeline's step in closed form, for ranking thousands of plans."""

from __future__ import annotations

from collections.abc import Sequence

from llmspec.compiler.orders import Schedule, stages_of

ROUNDING = 1 - 1e-9
"""Bounds are a little lower: a plan's price sums the same floats in another order."""


def makespan_s(
    spent: Sequence[tuple[float, float]],
    microbatches: int,
    send_s: float,
    *,
    schedule: Schedule = Schedule.ONE_F_ONE_B,
    ranks: int | None = None,
    late_s: Sequence[float] = (),
) -> tuple[float, float]:
    """(seconds without messages, seconds that messages add).

    The longer of two: the busiest rank works through every micro-batch and waits for the ramps, up
    and down; or, with few micro-batches, one runs through all stages and the others follow it
    through the slowest. It is exact for equal stages (in a V: from two micro-batches a rank on).

    spent: seconds of one micro-batch's forward and backward on each stage. late_s: of the backward,
        what waits for no other stage where it is split. ranks: None: as many as stages.
    """
    stages, ranks = len(spent), ranks or len(spent)
    late = list(late_s) if schedule.splits else [0.0] * stages
    urgent = [f + b - w for (f, b), w in zip(spent, late, strict=True)]
    own = [stages_of(schedule, rank, stages, ranks) for rank in range(ranks)]
    busiest = max(own, key=lambda rank: sum(sum(spent[s]) for s in rank))
    busy = microbatches * sum(sum(spent[s]) for s in busiest)
    # W fills what the ramps leave: each stage's wait is shorter by one
    waits = [u - w for u, w in zip(urgent, late, strict=True)]
    ramps = (sum(waits) - sum(waits[s] for s in busiest)) * ranks / stages
    up = sum(spent[s][0] for s in range(ranks) if s < busiest[0])
    chain = sum(urgent) + late[0] + (microbatches - 1) * max(urgent)
    return max(busy + max(ramps, up), chain), 2 * (stages - 1) * send_s


def least_span_s(
    busy_s: float,
    late_s: float,
    microbatches: int,
    *,
    schedule: Schedule,
    ranks: int,
    interleave: int,
) -> float:
    """No cut of a chain has a shorter `makespan_s`: that of equal stages is the least.

    busy_s, late_s: of one micro-batch on the whole chain.
    """
    late = late_s if schedule.splits else 0.0
    urgent = busy_s - late
    stages = ranks * interleave
    # what the busiest rank does besides its share, it waits less for
    ramps = (microbatches - 1 / interleave) * busy_s / ranks + (urgent - late) / interleave
    chain = urgent + (microbatches - 1) * urgent / stages
    return max(ramps, chain, microbatches * busy_s / ranks)


def least_makespan_s(
    spent: Sequence[tuple[float, float]],
    again_s: Sequence[float],
    microbatches: int,
    *,
    schedule: Schedule,
    late_s: Sequence[float],
) -> float:
    """No step whose ranks compute at least so much longer has a shorter `makespan_s`, without
    messages.

    again_s: by rank, what each micro-batch's backwards on its stages take besides `spent`.
        Whichever rank is the busiest in the end, it is at least as busy as the busiest is here.
    """
    stages, ranks = len(spent), len(again_s)
    late = list(late_s) if schedule.splits else [0.0] * stages
    both = [f + b for f, b in spent]
    own = [stages_of(schedule, rank, stages, ranks) for rank in range(ranks)]
    busiest = max(
        sum(both[s] for s in mine) + more for mine, more in zip(own, again_s, strict=True)
    )
    part = ranks / stages
    waits = sum(both) - 2 * sum(late) + sum(again_s)
    least_late = min(sum(late[s] for s in mine) for mine in own)
    ramps = (microbatches - part) * busiest + part * (waits + 2 * least_late)
    urgent = [s - w for s, w in zip(both, late, strict=True)]
    chain = sum(urgent) + late[0] + (microbatches - 1) * max(urgent)
    return max(ramps, microbatches * busiest, chain)
