"""Pipeline schedules as action lists, the words the runtime executes and the simulator plays.

"0F3" forward of micro-batch 3 on stage 0, "0B3" its backward, "0SEND_F3" and "1RECV_F3" what
stage 0 gives to stage 1, "1SEND_B3" and "0RECV_B3" its gradient; "0UNSHARD", "0RESHARD" and
"0REDUCE_GRAD" for data parallelism.
"""

import re
from enum import StrEnum
from typing import NamedTuple


class Schedule(StrEnum):
    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"


class Action(NamedTuple):
    """microbatch is None for UNSHARD, RESHARD and REDUCE_GRAD."""

    stage: int
    kind: str
    microbatch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"


def parse_action(word: str) -> Action:
    """Errors: ValueError if the word is not of the form that str(Action) gives."""
    match = re.fullmatch(r"(\d+)(F|B|SEND_F|RECV_F|SEND_B|RECV_B)(\d+)", word)
    if match:
        return Action(int(match[1]), match[2], int(match[3]))
    match = re.fullmatch(r"(\d+)(UNSHARD|RESHARD|REDUCE_GRAD)", word)
    if match:
        return Action(int(match[1]), match[2])
    raise ValueError(f"not a pipeline action: {word!r}")


def rank_of(schedule: Schedule, stage: int, ranks: int) -> int:
    """The pipeline rank that runs a stage."""
    return stage % ranks


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
    if schedule is Schedule.ONE_F_ONE_B and stages != ranks:
        raise ValueError(f"1f1b has one stage on each rank, not {stages} on {ranks}")
    compute = {}
    for rank in range(ranks):
        match schedule:
            case Schedule.GPIPE:
                compute[rank] = gpipe(tuple(range(rank, stages, ranks)), microbatches)
            case Schedule.ONE_F_ONE_B:
                compute[rank] = one_f_one_b(rank, stages, microbatches)
    with_sends = add_sends(compute)
    return {
        rank: tuple(str(action) for action in add_sharding(own, zero))
        for rank, own in with_sends.items()
    }


def gpipe(own_stages: tuple[int, ...], microbatches: int) -> list[Action]:
    """All forwards, then all backwards, stage by stage."""
    forwards = [Action(s, "F", m) for s in own_stages for m in range(microbatches)]
    backwards = [Action(s, "B", m) for s in own_stages[::-1] for m in range(microbatches)]
    return forwards + backwards


def one_f_one_b(stage: int, stages: int, microbatches: int) -> list[Action]:
    """At most stages - stage forwards in flight; fewer micro-batches than stages are fine."""
    warmup = min(stages - stage, microbatches)
    out = [Action(stage, "F", m) for m in range(warmup)]
    for m in range(microbatches):
        out.append(Action(stage, "B", m))
        if warmup + m < microbatches:
            out.append(Action(stage, "F", warmup + m))
    return out


def add_sends(compute: dict[int, list[Action]]) -> dict[int, list[Action]]:
    """Play the lists; note each send and its receive at the moment the value is made.

    All communication is then in one order of events that every rank follows, so no circle of
    ranks waits for each other, even where a send blocks until it is received.
    Errors: ValueError if the lists wait for themselves.
    """
    owner = {action.stage: rank for rank, own in compute.items() for action in own}
    last_stage = max(owner)
    out: dict[int, list[Action]] = {rank: [] for rank in compute}
    position = dict.fromkeys(compute, 0)
    done: set[Action] = set()
    while any(position[rank] < len(own) for rank, own in compute.items()):
        before = len(done)
        for rank, own in compute.items():
            if position[rank] == len(own) or not _inputs(own[position[rank]], last_stage) <= done:
                continue
            action = own[position[rank]]
            position[rank] += 1
            done.add(action)
            out[rank].append(action)
            to = action.stage + (1 if action.kind == "F" else -1)
            if owner.get(to, rank) != rank:
                out[rank].append(action._replace(kind=f"SEND_{action.kind}"))
                out[owner[to]].append(Action(to, f"RECV_{action.kind}", action.microbatch))
        if len(done) == before:
            raise ValueError("the schedule waits for itself")
    return out


def add_sharding(own: list[Action], zero: int) -> list[Action]:
    """One rank's list with UNSHARD, RESHARD and REDUCE_GRAD where this ZeRO level wants them."""
    last_backward = {action.stage: action for action in own if action.kind == "B"}
    out: list[Action] = []
    gathered: set[int] = set()
    for action in own:
        stage, whole = action.stage, zero in (1, 2)
        if whole and action.kind == "F" and stage not in gathered:
            gathered.add(stage)
            out.append(Action(stage, "UNSHARD"))
        out.append(action)
        is_last = action == last_backward[stage]
        if action.kind == "B" and (zero >= 2 or is_last):
            out.append(Action(stage, "REDUCE_GRAD"))
        if whole and is_last:
            out.append(Action(stage, "RESHARD"))
    return out


def _inputs(action: Action, last_stage: int) -> set[Action]:
    stage, kind, m = action
    if kind == "F":
        return {Action(stage - 1, "F", m)} if stage else set()
    after = {Action(stage + 1, "B", m)} if stage < last_stage else set()
    return {Action(stage, "F", m)} | after
