"""Which forwards and backwards each pipeline rank computes, and in what order.

"F" is a forward, "B" a whole backward; a split backward is "I", which makes the gradient that the
stage before waits for, and later "W", which makes the gradients of the matrices. Sends, and what
data parallelism adds, come after: schedules.py.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Schedule(StrEnum):
    GPIPE = "gpipe"
    ONE_F_ONE_B = "1f1b"
    INTERLEAVED = "interleaved"
    ZERO_BUBBLE = "zero_bubble"
    ZBV = "zbv"
    DUALPIPEV = "dualpipev"

    @property
    def splits(self) -> bool:
        """Whether some backwards are split into I and W."""
        return self in (Schedule.ZERO_BUBBLE, Schedule.ZBV, Schedule.DUALPIPEV)

    @property
    def turns(self) -> bool:
        """Whether the chain goes down the ranks and comes back up: a V."""
        return self in (Schedule.ZBV, Schedule.DUALPIPEV)

    def allows(self, interleave: int) -> bool:
        """So many stages on each rank."""
        match self:
            case Schedule.GPIPE | Schedule.ONE_F_ONE_B:
                return interleave == 1
            case Schedule.INTERLEAVED:
                return interleave > 1
            case Schedule.ZERO_BUBBLE:
                return interleave >= 1
            case Schedule.ZBV | Schedule.DUALPIPEV:
                return interleave == 2


class Action(NamedTuple):
    """microbatch is None for UNSHARD, RESHARD and REDUCE_GRAD."""

    stage: int
    kind: str
    microbatch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"


Order = dict[int, list[Action]]
"""What each rank computes."""


def rank_of(schedule: Schedule, stage: int, ranks: int) -> int:
    """Who runs a stage: stages go round the ranks, or down and back up in a V."""
    if schedule.turns:
        return min(stage, 2 * ranks - 1 - stage)
    return stage % ranks


def stages_of(schedule: Schedule, rank: int, stages: int, ranks: int) -> tuple[int, ...]:
    """The stages of a rank, in the chain's order."""
    if schedule.turns:
        return rank, 2 * ranks - 1 - rank
    return tuple(range(rank, stages, ranks))


def order(schedule: Schedule, stages: int, ranks: int, microbatches: int) -> Order:
    """Every rank's forwards and backwards. Any number of micro-batches will do."""
    match schedule:
        case Schedule.GPIPE:
            return {r: gpipe(tuple(range(r, stages, ranks)), microbatches) for r in range(ranks)}
        case Schedule.ONE_F_ONE_B:
            return {r: one_f_one_b(r, stages, microbatches) for r in range(ranks)}
        case Schedule.INTERLEAVED:
            return {r: interleaved(r, ranks, stages, microbatches) for r in range(ranks)}
        case Schedule.ZERO_BUBBLE:
            return {r: zero_bubble(r, ranks, stages, microbatches) for r in range(ranks)}
        case Schedule.ZBV:
            return zbv(ranks, microbatches)
        case Schedule.DUALPIPEV:
            return {r: dualpipev(r, ranks, microbatches) for r in range(ranks)}


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


# --------------------------------------------------------------------------------------------------
# Several stages on a rank, going round


def rounds(microbatches: int, ranks: int) -> list[int]:
    """Micro-batches that pass each of a rank's stages together: at least as many as ranks, or the
    rank waits for its own result to come round; the larger rounds first, or the warm-up is too
    short for them."""
    count = max(1, microbatches // ranks)
    least, more = divmod(microbatches, count)
    return [least + 1] * more + [least] * (count - more)


def _round_trip(
    rank: int, ranks: int, stages: int, sizes: list[int]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(stage, micro-batch) of a rank's forwards and of its backwards, in order."""
    own = range(rank, stages, ranks)
    forwards: list[tuple[int, int]] = []
    backwards: list[tuple[int, int]] = []
    first = 0
    for size in sizes:
        group = range(first, first + size)
        forwards += [(s, m) for s in own for m in group]
        backwards += [(s, m) for s in reversed(own) for m in group]
        first += size
    return forwards, backwards


def interleaved(rank: int, ranks: int, stages: int, microbatches: int) -> list[Action]:
    """Interleaved 1F1B: a bubble as many times smaller as a rank has stages.

    Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2; rounds of unequal size are ours.
    """
    sizes = rounds(microbatches, ranks)
    forwards, backwards = _round_trip(rank, ranks, stages, sizes)
    ahead = (stages // ranks - 1) * sizes[0] + 2 * (ranks - 1 - rank) + 1
    out = [Action(s, "F", m) for s, m in forwards[:ahead]]
    for done, (stage, m) in enumerate(backwards, start=ahead):
        out.append(Action(stage, "B", m))
        out += [Action(s, "F", f) for s, f in forwards[done : done + 1]]
    return out


def zero_bubble(rank: int, ranks: int, stages: int, microbatches: int) -> list[Action]:
    """1F1B, or interleaved 1F1B, with W as late as fills the bubbles and costs no memory beyond
    what the first rank needs anyway: rank r is r weight gradients behind.

    Source: ZB-H1 of Qi et al. 2023, arXiv:2401.10241.
    """
    sizes = rounds(microbatches, ranks)
    forwards, backwards = _round_trip(rank, ranks, stages, sizes)
    ahead = (stages // ranks - 1) * sizes[0] + ranks - 1 - rank
    out = [Action(s, "F", m) for s, m in forwards[:ahead]]
    late = backwards[: len(backwards) - rank] if rank else backwards
    for done, (stage, m) in enumerate(backwards):
        out += [Action(s, "F", f) for s, f in forwards[ahead + done : ahead + done + 1]]
        out.append(Action(stage, "I", m))
        if done >= rank:
            out.append(Action(late[done - rank][0], "W", late[done - rank][1]))
    return out + [Action(s, "W", m) for s, m in backwards[max(0, len(backwards) - rank) :]]


# --------------------------------------------------------------------------------------------------
# Two stages on a rank, in a V


def zbv(ranks: int, microbatches: int) -> Order:
    """ZBV: the bubble of ZB-H1 with half as long stages, in the memory of 1F1B's first rank.

    Source: Qi et al. 2024, arXiv:2405.15362. Its phases wait for what is not there when there are
    fewer than 2 × ranks micro-batches; then doing what is ready may be faster.
    """
    phases = {rank: _zbv_phases(rank, ranks, microbatches) for rank in range(ranks)}
    if microbatches >= 2 * ranks:
        return phases
    return min(phases, _zbv_ready(ranks, microbatches), key=_span)


def _zbv_phases(rank: int, ranks: int, microbatches: int) -> list[Action]:
    down, up = rank, 2 * ranks - 1 - rank
    below = ranks - rank
    count = max(microbatches, 2 * ranks)
    plan = [(down, "F")] * (2 * below - 1)
    plan += [(up, "F"), (down, "F")] * rank
    plan += [(up, "F"), (up, "I"), (up, "W")] * below
    turn = [(down, "I"), (down, "W"), (up, "F"), (up, "I"), (up, "W")]
    begun = 2 * below - 1 + rank
    plan += [(down, "F"), *turn] * (count - begun)
    plan += turn * (begun - ranks)
    plan += [(down, "I"), (up, "I")] * rank
    plan += [(down, "I"), (down, "W")] * below
    plan += [(up, "W")] * rank + [(down, "W")] * rank
    return [a for a in _numbered(plan) if (a.microbatch or 0) < microbatches]


def _zbv_ready(ranks: int, microbatches: int) -> Order:
    """Each rank does what is ready and most urgent: the oldest backward, a forward while fewer than
    2 × ranks are in flight (the way back first), a weight gradient."""
    last = 2 * ranks - 1
    play = _Play(last, microbatches)
    out: Order = {rank: [] for rank in range(ranks)}
    late: dict[int, list[Action]] = {rank: [] for rank in range(ranks)}
    held = dict.fromkeys(range(ranks), 0)
    while sum(map(len, out.values())) < 3 * (last + 1) * microbatches:
        begun = []
        for rank in range(ranks):
            down, up = rank, last - rank
            backwards = [a for s in (up, down) if (a := play.backward(s))]
            forwards = [a for s in (up, down) if (a := play.forward(s))]
            if backwards:
                action = min(backwards, key=lambda a: a.microbatch or 0)
                late[rank].append(action._replace(kind="W"))
            elif forwards and held[rank] < last + 1:
                action = forwards[0]
                held[rank] += 1
            elif late[rank]:
                action = late[rank].pop(0)
                held[rank] -= 1
            else:
                continue
            out[rank].append(action)
            begun.append(action)
        play.finish(begun)
    return out


def _span(order: Order) -> int:
    """Units of time that an order takes when each action lasts one."""
    last = max(a.stage for own in order.values() for a in own)
    count = 1 + max(a.microbatch or 0 for own in order.values() for a in own)
    play, left, span = _Play(last, count), {r: list(own) for r, own in order.items()}, 0
    while any(left.values()):
        begun = []
        for own in left.values():
            ready = own and (
                own[0].kind == "W"
                or own[0] == play.forward(own[0].stage)
                or own[0] == play.backward(own[0].stage)
            )
            if ready:
                begun.append(own.pop(0))
        play.finish(begun)
        span += 1
    return span


class _Play:
    """What can start, as actions finish that last one unit of time."""

    def __init__(self, last_stage: int, microbatches: int):
        self.last, self.count = last_stage, microbatches
        self.done = {kind: [0] * (last_stage + 1) for kind in "FI"}

    def forward(self, stage: int) -> Action | None:
        m = self.done["F"][stage]
        ready = m < self.count and (stage == 0 or self.done["F"][stage - 1] > m)
        return Action(stage, "F", m) if ready else None

    def backward(self, stage: int) -> Action | None:
        m = self.done["I"][stage]
        ready = self.done["F"][stage] > m and (stage == self.last or self.done["I"][stage + 1] > m)
        return Action(stage, "I", m) if ready else None

    def finish(self, begun: list[Action]) -> None:
        for action in begun:
            if action.kind != "W":
                self.done[action.kind][action.stage] += 1


def dualpipev(rank: int, ranks: int, microbatches: int) -> list[Action]:
    """Forwards of one way paired with backwards of the other, as kernels that overlap computing
    with communication would run them together; our executor runs a pair as two actions. Only
    backwards at the end of the warm-up and in the cool-down are split.

    Source: DeepSeek-AI 2025, github.com/deepseek-ai/DualPipe (DualPipeV); its eight phases.
    With fewer than 2 × ranks micro-batches: the order of so many, without those that are not there.
    """
    down, up = rank, 2 * ranks - 1 - rank
    below = ranks - 1 - rank
    count = max(microbatches, 2 * ranks)
    plan = [(down, "F")] * (2 * below)
    plan += [(down, "F"), (up, "F")] * (rank + 1)
    plan += [(up, "I"), (up, "W"), (up, "F")] * below
    plan += [(down, "F"), (up, "B"), (up, "F"), (down, "B")] * (count - 2 * ranks + rank + 1)
    plan += [(up, "B"), (up, "F"), (down, "B")] * below
    # from its middle on the cool-down splits, on odd ranks half a turn sooner
    turns = [(up, down)[i % 2] for i in range(2 * (rank + 1))]
    whole = 2 * ((rank + 1) // 2) + (rank % 2 == 0)
    plan += [(s, "B" if i < whole else "I") for i, s in enumerate(turns)]
    ends = "I" if whole < len(turns) else "B"
    plan += [(-1, "W"), (down, ends)] * below + [(-1, "W")] * (rank + 1)
    return [a for a in _numbered(plan) if (a.microbatch or 0) < microbatches]


def _numbered(plan: list[tuple[int, str]]) -> list[Action]:
    """Micro-batches in their order; W takes the oldest that waits (stage -1: on any stage), if one
    does."""
    seen: dict[tuple[int, str], int] = {}
    waiting: list[Action] = []
    out: list[Action] = []
    for stage, kind in plan:
        if kind == "W":
            for oldest in [a for a in waiting if stage in (-1, a.stage)][:1]:
                waiting.remove(oldest)
                out.append(oldest._replace(kind="W"))
            continue
        key = stage, "F" if kind == "F" else "B"
        action = Action(stage, kind, seen.get(key, 0))
        seen[key] = seen.get(key, 0) + 1
        out.append(action)
        waiting += [action] if kind == "I" else []
    return out
