"""The ledger of one rank: the most bytes alive at once in a steady step, part by part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.stage import Parts, Run, Stage
from llmspec.compiler.cost.types import Types


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """Bytes. The parts are those at the peak, so that they sum to it."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    fixed: int

    @property
    def total(self) -> int:
        stored = self.parameters + self.gradients + self.optimizer
        return stored + self.activations + self.buffers + self.fixed

    def parts(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Residence:
    """What decides how long and in how many pieces things live.

    shards, expert_shards: into how many parts ZeRO cuts what all data ranks have, and experts.
    in_flight: micro-batches whose activations a stage holds at once; of several stages or a split
        backward, what is held in units of one micro-batch on all of them.
    sends_on: the stage's output goes to another rank, and is kept for its backward.
    receives: its input comes from one. message_bytes: of values of others that wait to be used.
    split: backwards are in two parts; gradients of the first are whole until the second.
    whole_sums: ZeRO 1 keeps whole sums of gradients even of a single micro-batch.
    standing: gradients have a place all the time, of published software.
    awaited: of the elements that several stages have, those whose gradients have not begun to come
        while most is in flight, and those of experts among them.
    forwards: the most micro-batches at any moment that wait for their backward; of several stages
        in units of what one has in host memory on all of them.
    """

    zero: int
    data: int
    shards: int
    microbatches: int
    in_flight: float
    sends_on: bool
    split: bool = False
    expert_shards: int = 1
    receives: bool = False
    message_bytes: int = 0
    whole_sums: bool = False
    standing: bool = False
    awaited: tuple[int, int] = (0, 0)
    forwards: float = 1.0

    @property
    def parts(self) -> Parts:
        return Parts(shared=self.shards, experts=self.expert_shards) if self.zero else Parts()

    @property
    def first_is_fullest(self) -> bool:
        """All micro-batches are in flight as the first backward begins, and gradients come as it
        goes, or this rank's parts of them; data ranks that share none have buckets for theirs all
        the time."""
        come = self.sums_each_time and not self.standing
        come |= self.zero == 0 and self.data == 1
        return come and not self.split and self.in_flight >= self.microbatches

    @property
    def sums_each_time(self) -> bool:
        """Gradients come in the compute type, and leave as each unit's are summed."""
        single = self.microbatches == 1 and not self.whole_sums
        return self.zero > 1 or (self.zero == 1 and single)

    @property
    def gathers_experts(self) -> bool:
        """Experts that one rank alone has stay as they are whatever the level."""
        return self.zero > 0 and (self.expert_shards > 1 or self.whole_sums)


def cast_bytes(home: Residence, types: Types) -> tuple[int, int]:
    """Of each weight element that autograd keeps as its use casts it: of those that all data ranks
    have, and of experts'."""
    shared = types.compute if types.mixed and home.zero == 0 else 0
    return shared, types.compute if types.mixed and not home.gathers_experts else 0


def ledger(stage: Stage, home: Residence, types: Types, machine: Machine) -> Ledger:
    elements = home.parts.largest(stage.elements, stage.expert_elements)
    in_place = "gradients" in machine.fused
    peak = fullest(stage, home, types, backwards(stage, home, types, in_place))
    return Ledger(
        parameters=types.weights * elements,
        gradients=peak.gradients
        + peak.beside.gradients
        + software_bytes(stage, home, types, machine),
        optimizer=types.moments * elements,
        activations=peak.activations,
        buffers=gathered_bytes(stage, home, types) + home.message_bytes + peak.buffers,
        fixed=machine.fixed_bytes,
    )


def software_bytes(stage: Stage, home: Residence, types: Types, machine: Machine) -> int:
    """Of gradients, what published software has beside the sums."""
    elements = home.parts.largest(stage.elements, stage.expert_elements)
    held = round(machine.held_bytes * stage.elements + machine.part_bytes * elements)
    if machine.bucket_elements:
        held += types.reduced * (round(machine.bucket_elements) + stage.largest_elements)
    if machine.spare_gradients:
        held += types.compute * stage.spare_elements
    return held


def gradient_bytes(stage: Stage, home: Residence, types: Types) -> int:
    """ZeRO 1 keeps whole sums while it has micro-batches to add up, in the type of the reduction;
    the reduced parts come as these go. Where the first backward is followed as its gradients come,
    this is of the second."""
    awaited = (0, 0) if home.first_is_fullest else home.awaited
    elements, of_experts = stage.elements - awaited[0], stage.expert_elements - awaited[1]
    if home.zero == 0:
        return types.gradients * elements
    part = types.gradients * home.parts.largest(stage.elements, stage.expert_elements)
    if home.sums_each_time:
        return part + (types.reduced * stage.early_elements if home.split else 0)
    experts = 0 if home.gathers_experts else of_experts
    return types.reduced * (elements - experts) + types.gradients * experts


def gathered_bytes(stage: Stage, home: Residence, types: Types) -> int:
    """Weights in the compute type beyond what is stored, from the first moment to the last."""
    if home.zero == 0:
        return 0
    if home.zero == 3:
        # the root stays from its forward to its backward; see `passing` for the rest
        root = 0 if home.gathers_experts else stage.root_expert_elements
        return types.compute * (stage.root_elements - root)
    experts = 0 if home.gathers_experts else stage.expert_elements
    return types.compute * (stage.elements - experts)


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
    elements = _zero_elements(run, home)
    root = stage.root_elements - (stage.root_expert_elements if home.gathers_experts else 0)
    return _ZeroRun(run.count, elements, run.begins, elements[0] if run.repeated else root)


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


def working_bytes(run: Run, home: Residence, types: Types, cast: int, coming: int) -> int:
    """Of a use that goes backward, beside what is kept, with the gradients of its weights so far.
    `cast`: bytes of each weight that its use casts; `coming`: of each gradient that stays where it
    comes; with ZeRO they stay as computed until the unit is through."""
    return (
        run.working_bytes(cast, coming) if home.zero == 0 else run.working_bytes(0, types.compute)
    )


def making(stage: Stage, home: Residence, types: Types, cast: int, around: Around) -> Moment | None:
    """A forward that makes gradients, at the end of the chain; beside what is kept. ZeRO gathers
    nothing ahead then, but still has what the last gather gave, from which weights were copied."""
    last = stage.runs[-1] if stage.runs else None
    if last is None or last.cost.making is None:
        return None
    working = last.cost.making.total(0, cast)
    if home.zero == 0:
        return Moment(working=working)
    units = [sum(n) for run in reversed(stage.runs) if sum(n := _zero_elements(run, home))]
    own = sum(_zero_elements(last, home)) if home.zero == 3 else 0
    again = home.zero == 3 or home.microbatches == 1
    given = next(iter(units), 0) if again else 0
    during, _ = around[0][0]
    beside = during._replace(gathered=types.compute * (own + given))
    return Moment(working=working, beside=beside)


def _zero_elements(run: Run, home: Residence) -> tuple[int, int]:
    """Of the unit that ZeRO makes of one use, and of its experts', which are one inside it."""
    if not run.repeated:
        return 0, 0
    experts = run.cost.expert_elements
    return run.cost.elements - experts, experts if home.gathers_experts else 0


class Moment(NamedTuple):
    """Bytes at one moment of a step. working: of the unit that runs; beside: of ZeRO.

    Which it is: with so many micro-batches in flight, run number `run` of the stage goes backward
    (-1: all are through), `done` of its uses are through, and the next one is `running`.
    """

    activations: int = 0
    gradients: int = 0
    working: int = 0
    beside: Beside = NOTHING
    run: int = -1
    done: int = 0
    running: bool = False
    in_flight: float = 0.0

    @property
    def buffers(self) -> int:
        return self.working + self.beside.gathered + self.beside.summing

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.working + self.beside.total


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


def fullest(stage: Stage, home: Residence, types: Types, backward: Backwards) -> Moment:
    """The peak stands in the last backward that finds all micro-batches in flight. Gradients of
    earlier ones are there already; if there were none they come as it goes, and the next one finds
    them, with less in flight."""
    if not home.first_is_fullest:
        peak = backward(home.in_flight, 0)
        return peak._replace(gradients=gradient_bytes(stage, home, types))
    first = backward(home.in_flight, types.gradients)
    if home.microbatches == 1:
        return first
    second = backward(home.in_flight - 1, 0)
    second = second._replace(gradients=gradient_bytes(stage, home, types))
    return max(first, second, key=lambda moment: moment.total)


def backwards(stage: Stage, home: Residence, types: Types, in_place: bool = False) -> Backwards:
    """With all activations on the device."""
    casts = cast_bytes(home, types)
    sent = stage.output_bytes if home.sends_on else 0
    around = passing(stage, home, types, in_place)

    def backward(in_flight: float, coming: int) -> Moment:
        others = max(in_flight - 1, 0.0)
        earlier = round(others * stage.kept_bytes(*casts) + in_flight * sent)
        peak = _peak(stage, types, casts, coming, around, home)
        return peak._replace(activations=earlier + peak.activations, in_flight=in_flight)

    return backward


def first_moment(stage: Stage, alive: int, made: Moment | None) -> tuple[Moment, int]:
    """What a backward begins with, and its bytes. `made`: by the forward that ends before it."""
    if made is None:
        return Moment(), 0
    whole = made._replace(activations=alive, run=len(stage.runs) - 1, running=True)
    return whole, whole.total


def _peak(
    stage: Stage,
    types: Types,
    casts: tuple[int, int],
    coming: int,
    around: Around,
    home: Residence,
) -> Moment:
    """The fullest moment as a micro-batch goes backward: it frees what is kept, block by block, and
    what a block computes again is there while the block runs. `coming`: bytes of each weight
    element whose gradient comes meanwhile and stays."""
    alive, made = stage.kept_bytes(*casts), 0
    worst, most = first_moment(stage, alive, making(stage, home, types, casts[0], around))
    for index, (run, uses) in enumerate(zip(reversed(stage.runs), around, strict=True), 1):
        held, returning = run.kept_bytes(*casts), run.returning_bytes(*casts)
        grown = coming * coming_elements(run, home) if coming else 0
        working = working_bytes(run, home, types, casts[0], coming)
        # uses between the second and the last are like these, and what changes does so evenly
        for place, (during, after) in uses.items():
            here, come = alive - place * held, made + place * grown
            at, through = len(stage.runs) - index, place + 1
            size = here + returning + come + working + sum(during)
            if size > most:
                most = size
                worst = Moment(here + returning, come, working, during, at, place, running=True)
            size = here - held + come + grown + sum(after)
            if size > most:
                most = size
                worst = Moment(here - held, come + grown, 0, after, at, through)
        alive -= run.count * held
        made += run.count * grown
    return worst
