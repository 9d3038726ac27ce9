"""The fullest moment of one stage's backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llmspec.compiler.cost.passing import NOTHING, Around, Beside, zero_elements
from llmspec.compiler.cost.residence import Residence, sums_bytes
from llmspec.compiler.cost.stage import Run, Stage
from llmspec.compiler.cost.types import Types


class Moment(NamedTuple):
    """Bytes at one moment of a step. working: of the unit that runs; beside: of ZeRO.

    Which it is: with so many micro-batches in flight, run number `run` of the stage goes backward
    (-1: all are through), `done` of its uses are through, and the next one is `running`. begin: the
    first run of the pipeline stage that goes backward, kind: what it does ("I", "W": one part of a
    split backward). earlier: of the activations, those of others in flight. messages: of values of
    others, beyond those of the residence.
    """

    activations: int = 0
    gradients: int = 0
    working: int = 0
    beside: Beside = NOTHING
    run: int = -1
    done: int = 0
    running: bool = False
    in_flight: float = 0.0
    begin: int = 0
    kind: str = "B"
    earlier: int = 0
    messages: int = 0

    @property
    def buffers(self) -> int:
        return self.working + self.beside.gathered + self.beside.summing + self.messages

    @property
    def total(self) -> int:
        buffers = self.working + self.messages
        return self.activations + self.gradients + buffers + self.beside.total


class Early(NamedTuple):
    """Bytes of each element whose gradient comes in the first part of a backward: as it stays, and
    as it comes, beside that."""

    stays: int
    turned: int


Backwards = Callable[[float, int], Moment]
"""(micro-batches in flight, bytes of each gradient that comes meanwhile and stays) -> the fullest
moment of one micro-batch's backward."""


def coming_elements(run: Run, home: Residence) -> int:
    """Whose gradients stay after one use has gone backward: with ZeRO this rank's parts, the root's
    at the end of all."""
    if home.zero == 0:
        return run.cost.elements
    if not run.repeated:
        return 0
    return home.parts.largest(run.cost.elements, run.cost.expert_elements)


def coming_bytes(run: Run, home: Residence, types: Types, coming: int) -> int:
    """Of the gradients of one use that stay once they have come."""
    if not coming or home.zero == 0 or home.sums_each_time:
        return coming * coming_elements(run, home)
    return sums_bytes(run.cost.elements, run.cost.expert_elements, home, types)


def working_bytes(
    run: Run, home: Residence, types: Types, cast: int, coming: int, *, first_part: bool = False
) -> int:
    """Of a use that goes backward, beside what is kept, with the gradients of its weights so far.
    `cast`: bytes of each weight that its use casts; `coming`: of each gradient that stays where it
    comes; with ZeRO they stay as computed until the unit is through."""
    cast, coming = (cast, coming) if home.zero == 0 else (0, types.compute)
    return run.working_bytes(cast, coming, first_part=first_part)


def making(stage: Stage, home: Residence, types: Types, cast: int, around: Around) -> Moment | None:
    """A forward that makes gradients, at the end of the chain; beside what is kept. ZeRO gathers
    nothing ahead then, but still has what the last gather gave, from which weights were copied."""
    last = stage.runs[-1] if stage.runs else None
    if last is None or last.cost.making is None:
        return None
    working = last.cost.making.total(0, cast)
    if home.zero == 0:
        return Moment(working=working)
    units = [sum(n) for run in reversed(stage.runs) if sum(n := zero_elements(run, home))]
    own = sum(zero_elements(last, home)) if home.zero == 3 else 0
    again = home.zero == 3 or home.microbatches == 1
    given = next(iter(units), 0) if again else 0
    during, _ = around[0][0]
    beside = during._replace(gathered=types.compute * (own + given))
    return Moment(working=working, beside=beside)


def first_moment(stage: Stage, alive: int, made: Moment | None) -> tuple[Moment, int]:
    """What a backward begins with, and its bytes. `made`: by the forward that ends before it."""
    if made is None:
        return Moment(), 0
    whole = made._replace(activations=alive, run=len(stage.runs) - 1, running=True)
    return whole, whole.total


def peak_of_one(
    stage: Stage,
    types: Types,
    casts: tuple[int, int],
    coming: int,
    around: Around,
    home: Residence,
    early: Early | None = None,
) -> Moment:
    """The fullest moment as a micro-batch goes backward: it frees what is kept, block by block, and
    what a block computes again is there while the block runs. `coming`: bytes of each weight
    element whose gradient comes meanwhile and stays. `early`: of the first part of a backward, in
    which matrices' gradients do not come, and what they need stays."""
    alive, made = stage.kept_bytes(*casts), 0
    worst, most = first_moment(stage, alive, making(stage, home, types, casts[0], around))
    for index, (run, uses) in enumerate(zip(reversed(stage.runs), around, strict=True), 1):
        held, returning = run.kept_bytes(*casts), run.returning_bytes(*casts)
        freed, turned = held, 0
        grown = coming_bytes(run, home, types, coming)
        if early is not None:
            freed -= run.cost.late.size_bytes
            grown = early.stays * run.cost.late.early_elements
            turned = early.turned * run.cost.late.early_elements
        first = early is not None
        working = working_bytes(run, home, types, casts[0], coming, first_part=first)
        # uses between the second and the last are like these, and what changes does so evenly
        for place, (during, summed) in uses.items():
            after = summed if early is None else summed._replace(summing=during.summing)
            here, come = alive - place * freed, made + place * grown
            at, through = len(stage.runs) - index, place + 1
            size = here + returning + come + working + sum(during)
            if size > most:
                most = size
                worst = Moment(here + returning, come, working, during, at, place, running=True)
            size = here - freed + come + grown + turned + sum(after)
            if size > most:
                most = size
                worst = Moment(here - freed, come + grown, turned, after, at, through)
        alive -= run.count * freed
        made += run.count * grown
    return worst
