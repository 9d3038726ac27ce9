"""Plays a pipeline's action lists with durations: when each rank is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from llmspec.compiler.schedules import COMPUTES, Action, parse_action


def play_s(
    lists: Mapping[int, Sequence[str]],
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float,
    late_s: Sequence[float] = (),
) -> float:
    """Seconds until the last rank has finished its list.

    forward_s, backward_s: of one micro-batch on each stage. send_s: a message between stages; sends
    and receives are posted and waited for only where the value is needed, so they hold up nobody
    else. late_s: of the backward, what its second part takes where it is split.
    Errors: ValueError when the lists wait for themselves.
    """
    queues = {rank: _computing(tuple(own)) for rank, own in lists.items()}
    clock = dict.fromkeys(queues, 0.0)
    position = dict.fromkeys(queues, 0)
    done: dict[tuple[int, str, int | None], float] = {}
    owner = {a.stage: rank for rank, own in queues.items() for a in own}
    last = len(forward_s) - 1
    late = late_s or [0.0] * len(forward_s)
    first_part = [b - w for b, w in zip(backward_s, late, strict=True)]
    seconds = {"F": forward_s, "B": backward_s, "I": first_part, "W": late}
    while any(position[rank] < len(own) for rank, own in queues.items()):
        moved = False
        for rank, own in queues.items():
            while position[rank] < len(own):
                action = own[position[rank]]
                before = _needed(action, last)
                if before is not None and before not in done:
                    break
                ready = 0.0
                if before is not None:
                    away = owner[before[0]] != rank
                    ready = done[before] + (send_s if away else 0.0)
                clock[rank] = max(clock[rank], ready) + seconds[action.kind][action.stage]
                made = "B" if action.kind == "I" else action.kind
                done[action.stage, made, action.microbatch] = clock[rank]
                position[rank] += 1
                moved = True
        if not moved:
            raise ValueError("the action lists wait for themselves")
    return max(clock.values())


@lru_cache(maxsize=1024)
def _computing(words: tuple[str, ...]) -> list[Action]:
    """The forwards and backwards of one rank's list."""
    return [a for a in map(parse_action, words) if a.kind in COMPUTES]


def _needed(action: Action, last: int) -> tuple[int, str, int | None] | None:
    """What another stage must have done; a rank's own order is in its list."""
    stage, kind, microbatch = action
    if kind == "W":
        return None
    if kind == "F":
        return (stage - 1, "F", microbatch) if stage else None
    return (stage + 1, "B", microbatch) if stage < last else None
