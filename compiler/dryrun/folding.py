"""What repeats in a step runs until two turns of it in a row are alike; the rest is counted.

Without a pipeline a turn is a micro-batch. With one it is an action of the rank's list, of one kind
and stage: the forward of a further micro-batch adds what the one before it added, and its backward
frees what that one freed. Two turns are alike if they send the same, rise as high above where they
began and end as far from it. Nothing is assumed of a schedule: its own list is played to the end,
with actions of the micro-batches in the middle counted instead of run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmspec.compiler.dryrun.live import LiveBytes, Stretch
from llmspec.compiler.dryrun.sent import Key, Sent

FIRST = 3
"""Micro-batches that run at the beginning: gradients come with the first one, the second and the
third are to be alike."""

NOTHING = Counter[Key]()


class NotAlike(Exception):
    """Turns differ that were to be alike: nothing can be folded."""


@dataclass(frozen=True, slots=True)
class Effect:
    """Of one turn."""

    bytes: Stretch
    sent: Counter[Key]

    def like(self, other: Effect | None) -> bool:
        return other is not None and (self.bytes.rise, self.bytes.change, self.sent) == (
            other.bytes.rise,
            other.bytes.change,
            other.sent,
        )


@dataclass(slots=True)
class Folding:
    """warming: the step only leaves behind what a step leaves behind, and takes one micro-batch.
    whole: everything runs. counted: micro-batches of the step that were counted, not run. step:
    what an Executor has in flight."""

    live: LiveBytes
    sent: Sent
    whole: bool = False
    warming: bool = True
    counted: int = 0
    since: Counter[Key] = field(default_factory=Counter)
    step: Any = None

    def begin(self) -> None:
        self.since = self.sent.counted.copy()
        self.live.begin_stretch()

    def end(self) -> Effect:
        sent = self.sent.counted - self.since if self.sent.counted != self.since else NOTHING
        return Effect(self.live.end_stretch(), sent)

    def repeat(self, effect: Effect, times: int = 1) -> None:
        for key, often in effect.sent.items():
            self.sent.counted[key] += times * often
        for _ in range(times if effect.bytes.change else 1):
            self.live.repeat(effect.bytes)

    def microbatches(self, count: int) -> Iterator[tuple[bool, bool]]:
        """Whether each one that runs is the first and the last, of a step that takes one after the
        other."""
        if self.warming and not self.whole:
            yield True, True
            return
        before, done = None, 0
        while done < count:
            self.begin()
            yield done == 0, done == count - 1
            done += 1
            effect = self.end()
            left = count - 1 - done
            if not self.whole and left > 0 and effect.like(before):
                self.repeat(effect, left)
                self.counted, done = left, done + left
            before = effect

    def actions(self, every: Sequence[Any], turns: Mapping[Any, Any]) -> Iterator[Any]:
        """Those of a rank's list that run. `turns`: what its backwards are told."""
        run = self._that_run(every, turns)
        known: dict[Any, list[Effect]] = {}
        for action in every:
            what = (action.stage, action.kind, turns.get(action))
            if action.microbatch < 0 or action.microbatch in run:
                self.begin()
                yield action
                self._drop_sent()
                known.setdefault(what, []).append(self.end())
            elif not self.warming:
                before = known.get(what, [])
                if len(before) < 2 or not before[-1].like(before[-2]):
                    raise NotAlike(str(action))
                self.repeat(before[-1])
        # what ran after those that were counted was like them
        if self.counted and any(not one[-1].like(one[1]) for one in known.values() if one[2:]):
            raise NotAlike("the last micro-batch")

    def _drop_sent(self) -> None:
        """A message that has left is gone at once, not when the next one leaves."""
        sends = self.step.sends
        for action in [a for a, works in sends.items() if all(w.is_completed() for w in works)]:
            del sends[action]

    def _that_run(self, every: Sequence[Any], turns: Mapping[Any, Any]) -> set[int]:
        order = list(dict.fromkeys(a.microbatch for a in every if a.kind == "F"))
        if self.whole:
            return set(order)
        often = Counter((a.stage, a.kind, turns.get(a)) for a in every if a in turns)
        single = {a.microbatch for a in turns if often[a.stage, a.kind, turns[a]] == 1}
        last = {a.microbatch for a in turns if turns[a].last}
        if self.warming:
            return last
        run = {*order[:FIRST], *order[-1:], *single, *last}
        self.counted = len(order) - len(run)
        return run
