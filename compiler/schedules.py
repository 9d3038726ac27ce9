"""Pipeline schedules as action lists, the words the runtime executes and the simulator plays.

"0F3" forward of micro-batch 3 on stage 0, "0B3" its backward, or "0I3" the part of it that makes
the input's gradient and "0W3" the part that makes the matrices'; "0SEND_F3" and "1RECV_F3" what
stage 0 gives to stage 1, "1SEND_B3" and "0RECV_B3" its gradient; "0UNSHARD", "0RESHARD" and
"0REDUCE_GRAD" for data parallelism.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from llmspec.compiler.orders import Action, Order, Schedule, order, rank_of, rounds, stages_of
from llmspec.compiler.undominated import undominated

__all__ = [
    "COMPUTES",
    "Action",
    "Held",
    "Schedule",
    "actions",
    "held_at_once",
    "parse_action",
    "rank_of",
    "stages_of",
]


COMPUTES = ("F", "B", "I", "W")
"""Kinds of actions that take a rank's time; the others move values, or wait for them."""


def parse_action(word: str) -> Action:
    """Errors: ValueError if the word is not of the form that str(Action) gives."""
    match = re.fullmatch(r"(\d+)(F|B|I|W|SEND_F|RECV_F|SEND_B|RECV_B)(\d+)", word)
    if match:
        return Action(int(match[1]), match[2], int(match[3]))
    match = re.fullmatch(r"(\d+)(UNSHARD|RESHARD|REDUCE_GRAD)", word)
    if match:
        return Action(int(match[1]), match[2])
    raise ValueError(f"not a pipeline action: {word!r}")


def actions(
    schedule: Schedule, stages: int, ranks: int, microbatches: int, zero: int
) -> dict[int, tuple[str, ...]]:
    """Every pipeline rank's list, in an order of sends and receives that cannot deadlock.

    zero: 1 and 2 gather a stage's parameters once a step; 0 and 1 reduce its gradients once,
        2 and 3 in every micro-batch. ZeRO 3 gathers layer by layer, which is no action.
    Errors: ValueError if the stages do not fit the ranks.
    """
    if stages % ranks:
        raise ValueError(f"{stages} stages do not divide over {ranks} pipeline ranks")
    # GPipe with several stages on a rank is no plan's, but a good test of the executor
    if schedule is not Schedule.GPIPE and not schedule.allows(stages // ranks):
        raise ValueError(f"{schedule} does not take {stages} stages on {ranks} ranks")
    with_sends = add_sends(order(schedule, stages, ranks, microbatches))
    return {
        rank: tuple(str(action) for action in add_sharding(own, zero))
        for rank, own in with_sends.items()
    }


def add_sends(compute: Order) -> Order:
    """Play the lists; note each send and its receive at the moment the value is made.

    All communication is then in one order of events that every rank follows, so no circle of
    ranks waits for each other, even where a send blocks until it is received.
    Errors: ValueError if the lists wait for themselves.
    """
    owner = {action.stage: rank for rank, own in compute.items() for action in own}
    count = 1 + max(action.microbatch or 0 for own in compute.values() for action in own)
    turns = {rank: [_turn(a, rank, owner, count) for a in own] for rank, own in compute.items()}
    out: Order = {rank: [] for rank in compute}
    position = dict.fromkeys(compute, 0)
    done = bytearray(2 + 2 * count * (1 + max(owner)))
    done[0] = True
    left = sum(map(len, turns.values()))
    while left:
        before = left
        for rank, own in turns.items():
            at = position[rank]
            if at == len(own):
                continue
            action, first, second, made, to, sent, received = own[at]
            if not (done[first] and done[second]):
                continue
            position[rank] = at + 1
            left -= 1
            done[made] = True
            out[rank].append(action)
            if to is not None:
                out[rank].append(sent)
                out[to].append(received)
        if left == before:
            raise ValueError("the schedule waits for itself")
    return out


class _Turn(NamedTuple):
    """An action as `add_sends` plays it. first, second: what must be done before, made: what it
    does, all by number: 0 is done from the start, 1 is what nothing waits for. to: the rank that
    waits for it; None: no other."""

    action: Action
    first: int
    second: int
    made: int
    to: int | None
    sent: Action
    received: Action


def _turn(action: Action, rank: int, owner: Mapping[int, int], count: int) -> _Turn:
    """count: of micro-batches. To other stages, a backward is done when its I is."""
    stage, kind, m = action
    number = 2 + 2 * ((m or 0) + count * stage)
    if kind == "W":
        return _Turn(action, number + 1, 0, 1, None, action, action)
    forward = kind == "F"
    source, after = (stage - 1, stage + 1) if forward else (stage + 1, stage - 1)
    before = number + 2 * count * (source - stage) + (not forward) if source in owner else 0
    made, to = "F" if forward else "B", owner.get(after, rank)
    return _Turn(
        action,
        0 if forward else number,
        before,
        number + (not forward),
        to if to != rank else None,
        Action(stage, f"SEND_{made}", m),
        Action(after, f"RECV_{made}", m),
    )


def add_sharding(own: list[Action], zero: int) -> list[Action]:
    """One rank's list with UNSHARD, RESHARD and REDUCE_GRAD where this ZeRO level wants them."""
    # what completes a micro-batch's gradients: B, or W
    last_backward = {action.stage: action for action in own if action.kind in ("B", "W")}
    out: list[Action] = []
    gathered: set[int] = set()
    for action in own:
        stage, whole = action.stage, zero in (1, 2)
        if whole and action.kind == "F" and stage not in gathered:
            gathered.add(stage)
            out.append(Action(stage, "UNSHARD"))
        out.append(action)
        is_last = action == last_backward[stage]
        if action.kind in ("B", "W") and (zero >= 2 or is_last):
            out.append(Action(stage, "REDUCE_GRAD"))
        if whole and is_last:
            out.append(Action(stage, "RESHARD"))
    return out


# --------------------------------------------------------------------------------------------------
# What is in flight


NONE, EARLY, ALL = range(3)
"""Which gradients of a stage have come: after its first I, those that need no W."""


class Held(NamedTuple):
    """Micro-batches that a rank holds at one moment, for each of its stages in the chain's order.

    forwards: whose backward has not begun. late: between I and W. messages: values of other ranks
    that nothing has used yet; that of the next backward is there until its end. come: which of the
    stage's gradients have come in backwards before this one. early: whether no W has followed the
    last I. done: whether its last backward is over. runs: the place of the stage that goes backward
    now, kind: which part of it.
    """

    forwards: tuple[int, ...]
    late: tuple[int, ...]
    messages: int = 0
    come: tuple[int, ...] = ()
    early: tuple[int, ...] = ()
    runs: int = 0
    kind: str = "B"
    done: tuple[int, ...] = ()


@lru_cache(maxsize=4096)
def held_at_once(
    schedule: Schedule, stages: int, ranks: int, microbatches: int
) -> tuple[tuple[Held, ...], ...]:
    """By rank: the moments that no other one as the same stage does the same exceeds in every
    number."""
    if schedule is Schedule.GPIPE:
        first = Held((microbatches,), (0,), 1, come=(NONE,), early=(0,), done=(0,))
        second = first._replace(forwards=(microbatches - 1,), come=(ALL,))
        return ((first, second) if microbatches > 1 else (first,),) * ranks
    fewer = _representative(schedule, stages, ranks, microbatches)
    if fewer < microbatches:
        return held_at_once(schedule, stages, ranks, fewer)
    lists = add_sends(order(schedule, stages, ranks, microbatches))
    return tuple(
        _moments(lists[rank], stages_of(schedule, rank, stages, ranks)) for rank in range(ranks)
    )


def _representative(schedule: Schedule, stages: int, ranks: int, microbatches: int) -> int:
    """Fewer micro-batches, with which as many are in flight: after the warm-up, it stays."""
    if stages == ranks or schedule.turns:
        return min(microbatches, 2 * ranks + 2)
    sizes = rounds(microbatches, ranks)
    if sizes[-1] != ranks:
        return microbatches
    rounds_each = 4 if schedule.splits else 3
    larger, least = (min(sizes.count(n), rounds_each) for n in (ranks + 1, ranks))
    return larger * (ranks + 1) + least * ranks


def _moments(own: Sequence[Action], stages: tuple[int, ...]) -> tuple[Held, ...]:
    """`own`: a rank's list, sends and receives among it."""
    count = len(stages)
    at = {stage: i for i, stage in enumerate(stages)}
    forwards, late, early, come = ([0] * count for _ in range(4))
    # a stage whose last backward is over holds no more than before
    undone, last = [1] * count, {action.stage: action for action in own if action.kind in "BW"}
    came: set[tuple[int, str, int | None]] = set()
    seen: dict[tuple[int, ...], None] = {}
    for action in own:
        stage, kind, m = action
        if kind not in COMPUTES:
            if kind.startswith("RECV"):
                came.add((stage, kind[-1], m))
            continue
        place = at[stage]
        if kind != "F":
            numbers = (*forwards, *late, *come, *early, *undone, len(came))
            seen[*numbers, place, COMPUTES.index(kind)] = None
        came.discard((stage, "B" if kind == "I" else kind, m))
        forwards[place] += {"F": 1, "B": -1, "I": -1}.get(kind, 0)
        late[place] += {"I": 1, "W": -1}.get(kind, 0)
        if kind != "F":
            early[place] = int(kind == "I")
            come[place] = max(come[place], EARLY if kind == "I" else ALL)
        if action == last[stage]:
            undone[place] = 0
    alike: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for row in seen:
        alike.setdefault(row[-2:], []).append(row)
    return tuple(
        Held(
            forwards=row[:count],
            late=row[count : 2 * count],
            messages=row[-3],
            come=row[2 * count : 3 * count],
            early=row[3 * count : 4 * count],
            done=tuple(1 - one for one in row[4 * count : -3]),
            runs=row[-2],
            kind=COMPUTES[row[-1]],
        )
        for rows in alike.values()
        for row in undominated(rows)
    )
