"""Plays the action lists that the runtime executes, with durations: when each rank does what.

A rank has streams that run side by side: it computes on one, its messages to the ranks after and
before go over one each, and what data ranks reduce at the end of a step goes over another. Ranks
that differ in nothing but their place on the other axes are one rank here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from llmspec.compiler.schedules import COMPUTES, Action, parse_action

COMPUTE, DATA, NEXT, PREVIOUS = "compute", "data", "next", "previous"
"""Streams: what computes, what data ranks reduce, messages to the rank after and to the one
before (of two ranks each is the one after)."""

GATHER, REDUCE, TIED, PARTIAL, UPDATE = "gather", "reduce", "tied", "partial", "update"
"""Kinds of events besides the actions' own: gathering a stage's parameters once a step (UNSHARD),
the last reduction of its gradients (REDUCE_GRAD), the sum of weights that two stages hold, of
gradients that are partial over tensor ranks, the optimizer."""


class Event(NamedTuple):
    """What one stream of a pipeline rank does for a while.

    kind: an action's, of which SEND_F and SEND_B are a message on its way; or one of the above.
    after: the event whose end let it start, by its place among all; -1: nothing did.
    """

    rank: int
    stream: str
    kind: str
    stage: int
    microbatch: int | None
    start_s: float
    stop_s: float
    after: int

    @property
    def spent_s(self) -> float:
        return self.stop_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StageWork:
    """Seconds of one stage: of a micro-batch's forward and backward, of the backward what comes
    later where it is split, and of what data ranks gather and reduce once a step."""

    forward_s: float
    backward_s: float
    late_s: float = 0.0
    gather_s: float = 0.0
    reduce_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Seconds of what a rank does when its list is done: sums over tensor ranks, then, when all
    know the norm of the gradients, its update."""

    tensor_s: float = 0.0
    update_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.tensor_s + self.update_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """Events in an order in which each stands behind the one it waited for."""

    events: tuple[Event, ...]

    @property
    def stop_s(self) -> float:
        return max((e.stop_s for e in self.events), default=0.0)

    def hidden_s(self, rank: int) -> float:
        """Of what a rank's data stream does, seconds in which the rank computes."""
        own = [e for e in self.events if e.rank == rank and e.stream in (COMPUTE, DATA)]
        reductions = [e for e in own if e.stream == DATA]
        first = min((e.start_s for e in reductions), default=0.0)
        late = [e for e in own if e.stream == COMPUTE and e.stop_s > first]
        shared = (
            min(a.stop_s, b.stop_s) - max(a.start_s, b.start_s) for a in reductions for b in late
        )
        return sum(seconds for seconds in shared if seconds > 0)

    def critical_path(self) -> list[Event]:
        """The events that make the step as long as it is, from its start to its end: each begins
        when the one before ends."""
        if not self.events:
            return []
        at = max(range(len(self.events)), key=lambda i: self.events[i].stop_s)
        found = []
        while at >= 0:
            found.append(self.events[at])
            at = self.events[at].after
        return found[::-1]


def play(
    lists: Mapping[int, Sequence[str]],
    works: Sequence[StageWork],
    send_s: float,
    endings: Sequence[Ending] = (),
    tied_s: float = 0.0,
) -> Played:
    """One step. send_s: of one message between stages; those of a rank to another go one after
    the other, and hold up nobody but who waits for them. endings: by rank. tied_s: of the
    sum between the first and the last stage's ranks.

    Errors: ValueError when the lists wait for themselves.
    """
    player = _Player(lists, works, send_s)
    player.run()
    if endings:
        player.end(endings, tied_s)
    return Played(events=tuple(player.events))


def play_s(
    lists: Mapping[int, Sequence[str]],
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    send_s: float,
    late_s: Sequence[float] = (),
) -> float:
    """Seconds until the last rank has finished its list of forwards and backwards alone."""
    late = late_s or [0.0] * len(forward_s)
    works = [
        StageWork(forward_s=f, backward_s=b, late_s=w)
        for f, b, w in zip(forward_s, backward_s, late, strict=True)
    ]
    events = play(lists, works, send_s).events
    return max(e.stop_s for e in events if e.stream == COMPUTE)


class _Player:
    def __init__(
        self, lists: Mapping[int, Sequence[str]], works: Sequence[StageWork], send_s: float
    ):
        self.queues = {rank: _parsed(tuple(own)) for rank, own in lists.items()}
        self.owner = {a.stage: rank for rank, own in self.queues.items() for a in own}
        self.last, self.send_s = len(works) - 1, send_s
        self.seconds = {
            "F": [w.forward_s for w in works],
            "B": [w.backward_s for w in works],
            "I": [w.backward_s - w.late_s for w in works],
            "W": [w.late_s for w in works],
            "UNSHARD": [w.gather_s for w in works],
        }
        self.reduce_s = [w.reduce_s for w in works]
        self.events: list[Event] = []
        # by (rank, stream): when it is free, and the event that it has last run
        self.free: dict[tuple[int, str], tuple[float, int]] = {}
        # by (stage, kind, micro-batch): when a value is there, and the event that brought it
        self.made: dict[tuple[int, str, int | None], tuple[float, int]] = {}
        self.arrived: dict[tuple[int, str, int | None], tuple[float, int]] = {}

    def run(self) -> None:
        position = dict.fromkeys(self.queues, 0)
        left = sum(len(own) for own in self.queues.values())
        while left:
            before = left
            for rank, own in self.queues.items():
                at = position[rank]
                while at < len(own) and self._step(rank, own[at]):
                    at += 1
                left -= at - position[rank]
                position[rank] = at
            if left == before:
                raise ValueError("the action lists wait for themselves")

    def _step(self, rank: int, action: Action) -> bool:
        """Do it; False while what it needs is not there."""
        stage, kind, microbatch = action
        if kind in COMPUTES:
            ready = self._input(rank, action)
            if ready is None:
                return False
            made = "B" if kind == "I" else kind
            done = self._add(rank, COMPUTE, action, self.seconds[kind][stage], ready)
            self.made[stage, made, microbatch] = done
        elif kind in ("SEND_F", "SEND_B"):
            made, to = kind[-1], stage + (1 if kind == "SEND_F" else -1)
            stream = NEXT if self.owner[to] == (rank + 1) % len(self.queues) else PREVIOUS
            sent = self.made.get((stage, made, microbatch))
            if sent is None:
                return False
            self.arrived[to, made, microbatch] = self._add(rank, stream, action, self.send_s, sent)
        elif kind == "UNSHARD":
            gather = Action(stage, GATHER)
            self._add(rank, COMPUTE, gather, self.seconds[kind][stage], NOTHING)
        elif self.reduce_s[stage]:
            computed = self.free.get((rank, COMPUTE), NOTHING)
            self._add(rank, DATA, Action(stage, REDUCE), self.reduce_s[stage], computed)
        return True

    def _input(self, rank: int, action: Action) -> tuple[float, int] | None:
        """When what another stage makes for it is there; None while that, or what this stage has
        to do before, is not."""
        stage, kind, microbatch = action
        earlier = {"B": "F", "I": "F", "W": "B"}.get(kind)
        if earlier is not None and (stage, earlier, microbatch) not in self.made:
            return None
        if kind == "W" or (kind == "F" and stage == 0) or (kind != "F" and stage == self.last):
            return NOTHING
        source, made = (stage - 1, "F") if kind == "F" else (stage + 1, "B")
        if self.owner.get(source) == rank:
            return self.made.get((source, made, microbatch))
        return self.arrived.get((stage, made, microbatch))

    def _add(
        self, rank: int, stream: str, action: Action, seconds: float, ready: tuple[float, int]
    ) -> tuple[float, int]:
        """An event as soon as its input is there and its stream is free: (its end, its place)."""
        start, after = max(ready, self.free.get((rank, stream), NOTHING), key=_when)
        done = (start + seconds, len(self.events))
        self.events.append(Event(rank, stream, *_named(action), start, done[0], after))
        self.free[rank, stream] = done
        return done

    def end(self, endings: Sequence[Ending], tied_s: float) -> None:
        """What follows the lists. The norm of the gradients is known when all ranks have theirs."""
        ranks = sorted(self.queues)
        done = {rank: self._done(rank) for rank in ranks}
        ends = {self.owner[0], self.owner[self.last]}
        if tied_s:
            both = max((done[rank] for rank in ends), key=_when)
            for rank in ends:
                done[rank] = self._add(rank, COMPUTE, Action(0, TIED), tied_s, both)
        for rank, ending in zip(ranks, endings, strict=True):
            if ending.tensor_s:
                partial = Action(-1, PARTIAL)
                done[rank] = self._add(rank, COMPUTE, partial, ending.tensor_s, done[rank])
        norm = max(done.values(), key=_when)
        for rank, ending in zip(ranks, endings, strict=True):
            self._add(rank, COMPUTE, Action(-1, UPDATE), ending.update_s, norm)

    def _done(self, rank: int) -> tuple[float, int]:
        streams = (self.free.get((rank, s), NOTHING) for s in (COMPUTE, DATA))
        return max(streams, key=_when)


NOTHING = (0.0, -1)


def _when(moment: tuple[float, int]) -> float:
    return moment[0]


def _named(action: Action) -> tuple[str, int, int | None]:
    return action.kind, action.stage, action.microbatch


@lru_cache(maxsize=1024)
def _parsed(words: tuple[str, ...]) -> tuple[Action, ...]:
    """One rank's list. Receives are posted long before, and take nobody's time; all but the last
    of a stage's reductions are part of their backwards."""
    quiet = ("RECV_F", "RECV_B", "RESHARD")
    known = [a for a in map(parse_action, words) if a.kind not in quiet]
    last = {a: i for i, a in enumerate(known)}
    return tuple(a for i, a in enumerate(known) if a.kind != "REDUCE_GRAD" or last[a] == i)
