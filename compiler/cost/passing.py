"""What ZeRO has beside a unit as its uses go backward: gathered weights, gradients on their way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from llmspec.compiler.cost.residence import Residence
from llmspec.compiler.cost.stage import Run, Stage
from llmspec.compiler.cost.types import Types


class Beside(NamedTuple):
    """Bytes that ZeRO has besides at one moment. gathered: of weights; summing: of gradients on
    their way; gradients: what has left of whole sums, negative."""

    gathered: int = 0
    summing: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        return sum(self)


NOTHING = Beside()

Passing = tuple[Beside, Beside]
"""While one use of a unit goes backward, and as its gradients are summed after that."""


class _Sums(NamedTuple):
    """What of a residence decides when ZeRO gathers and sums, and in how many parts. adds_up:
    several micro-batches are in flight as sums are added up. retains: what a stage sums last in a
    micro-batch stays until it sums again."""

    zero: int
    shards: int
    expert_shards: int
    each_time: bool
    adds_up: bool
    retains: bool


Around = Sequence[Mapping[int, Passing]]


def passing(stage: Stage, home: Residence, types: Types, in_place: bool) -> Around:
    """For each run, the last one first, by the place of a use in it, the last one first: 0, 1 (and
    all that are like it), and the one that goes backward last.

    in_place: gradients are summed where they are."""
    runs = tuple(_zero_run(stage, run, home) for run in reversed(stage.runs))
    retains = home.zero > 1 and home.microbatches > 1
    several = home.in_flight > 1
    sums = _Sums(home.zero, home.shards, home.expert_shards, home.sums_each_time, several, retains)
    return _passing(runs, sums, types, in_place)


class _ZeroRun(NamedTuple):
    """Uses of a unit: how many, and elements of each, and of its experts'. begins: a stage begins
    with them; ends: elements of what that stage sums last."""

    uses: int
    elements: tuple[int, int]
    begins: bool
    ends: int


def _zero_run(stage: Stage, run: Run, home: Residence) -> _ZeroRun:
    elements = zero_elements(run, home)
    root = stage.root_elements - (stage.root_expert_elements if home.gathers_experts else 0)
    ends = elements[0] if run.repeated else root
    if home.split and run.begins:  # what has no matrices is left to the end
        part = next(part for part in stage.parts if part.runs[0] is run)
        left = [other for other in part.runs if not other.cost.late.size_bytes]
        ends = zero_elements(left[-1], home)[0] if left else ends
    return _ZeroRun(run.count, elements, run.begins, ends)


@lru_cache(maxsize=1 << 16)
def _passing(runs: tuple[_ZeroRun, ...], sums: _Sums, types: Types, in_place: bool) -> Around:
    sizes = [*(run.elements for run in runs), (0, 0)]
    out: list[dict[int, Passing]] = []
    done = 0
    pending = _pending(runs, sums, types)
    for index, (count, own, *_) in enumerate(runs):
        before = sizes[index + 1]
        found: dict[int, Passing] = {}
        end = count - 1
        for place in dict.fromkeys((0, min(1, end), end)):
            if sums.zero == 0:
                found[place] = NOTHING, NOTHING
                continue
            later = own if place < end else before
            two = _zero_3(own, later, types) if sums.zero == 3 else (NOTHING, NOTHING)
            if not in_place:
                waits = pending[index][place > 0]
                two = _summing(two, waits, own, done + place * sum(own), sums, types)
            found[place] = two
        done += count * sum(own)
        out.append(found)
    return out


def _pending(
    runs: tuple[_ZeroRun, ...], sums: _Sums, types: Types
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """For each run, bytes that wait to be let go before its first use goes backward, and before a
    later one; each also of other stages alone."""
    first = [types.reduced * r.ends if sums.retains else 0 for r in runs if r.begins]
    out, stage, before = [], 0, first[0] if first else 0
    for run in runs:
        others = sum(first) - first[stage] if stage < len(first) else 0
        own = types.reduced * run.elements[0] if sum(run.elements) else before
        out.append(((before + others, others), (own + others, others)))
        before = own
        if run.begins:
            stage += 1
            before = first[stage] if stage < len(first) else 0
    return out


def _zero_3(own: tuple[int, int], later: tuple[int, int], types: Types) -> Passing:
    """A unit's weights, and those of the one that goes backward next."""
    ahead = types.compute * sum(later)
    return Beside(gathered=types.compute * sum(own) + ahead), Beside(gathered=ahead)


def _summing(
    held: Passing,
    waits: tuple[int, int],
    own: tuple[int, int],
    done: int,
    sums: _Sums,
    types: Types,
) -> Passing:
    """What sums gradients takes them in its own type and gives this rank's part; it has its input
    until the stage's next sum begins. `waits`: bytes of such inputs, and of those of other stages;
    `done`: elements of units that are through.

    ZeRO 1 sums in the last micro-batch alone, whose weights and whole gradients leave meanwhile.
    """
    pending, elsewhere = waits
    largest = max(own)
    ways = sums.shards if largest == own[0] else sums.expert_shards
    summed = types.reduced * largest + types.reduced * -(-largest // ways)
    during, after = held
    if sums.each_time:
        summed += types.compute * largest  # as they were computed
        return (
            Beside(during.gathered, pending, during.gradients),
            Beside(after.gathered, summed + elsewhere, after.gradients),
        )
    if sums.adds_up:
        return held
    gone, left = -types.compute * done, -types.reduced * done
    return (
        Beside(gathered=gone, summing=pending, gradients=left),
        Beside(gathered=gone - types.compute * largest, summing=summed, gradients=left),
    )


def zero_elements(run: Run, home: Residence) -> tuple[int, int]:
    """Of the unit that ZeRO makes of one use, and of its experts', which are one inside it."""
    if not run.repeated:
        return 0, 0
    experts = run.cost.expert_elements
    return run.cost.elements - experts, experts if home.gathers_experts else 0
