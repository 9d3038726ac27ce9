"""The ledger of one rank: the most bytes alive at once in a steady step, part by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.stage import Parts, Stage
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
    receives: its input comes from one.
    split: backwards are in two parts; gradients of the first are whole until the second.
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

    @property
    def parts(self) -> Parts:
        return Parts(shared=self.shards, experts=self.expert_shards) if self.zero else Parts()

    @property
    def alone(self) -> bool:
        """Gradients come as the only backward goes."""
        return self.zero == 0 and self.data == 1 and self.microbatches == 1

    @property
    def gathers_experts(self) -> bool:
        """Experts that one rank alone has stay as they are whatever the level."""
        return self.zero > 0 and self.expert_shards > 1


def cast_bytes(home: Residence, types: Types) -> tuple[int, int]:
    """Of each weight element that autograd keeps as its use casts it: of those that all data ranks
    have, and of experts'."""
    shared = types.compute if types.mixed and home.zero == 0 else 0
    return shared, types.compute if types.mixed and not home.gathers_experts else 0


def ledger(stage: Stage, home: Residence, types: Types, machine: Machine) -> Ledger:
    """The peak stands in the last backward that finds all micro-batches in flight: gradients of
    earlier ones are there already. With one micro-batch on one data rank they come as it goes."""
    elements = home.parts.largest(stage.elements, stage.expert_elements)
    casts = cast_bytes(home, types)
    sent = stage.output_bytes if home.sends_on else 0
    others = max(home.in_flight - 1, 0.0)
    earlier = round(others * stage.kept_bytes(*casts) + home.in_flight * sent)
    peak = _peak(stage, casts, types.gradients if home.alone else 0)
    gradients = peak.gradients if home.alone else _gradient_bytes(stage, home, types)
    return Ledger(
        parameters=types.weights * elements,
        gradients=gradients,
        optimizer=types.moments * elements,
        activations=earlier + peak.activations,
        buffers=gathered_bytes(stage, home, types, "gradients" in machine.fused) + peak.working,
        fixed=machine.fixed_bytes,
    )


def moving_bytes(stage: Stage, home: Residence, types: Types) -> int:
    """What blocks make and free, at the peak of `ledger`: the rest is there whatever is computed
    again."""
    casts = cast_bytes(home, types)
    peak = _peak(stage, casts, types.gradients if home.alone else 0)
    others = max(home.in_flight - 1, 0.0)
    return round(others * stage.kept_bytes(*casts)) + peak.total


def _gradient_bytes(stage: Stage, home: Residence, types: Types) -> int:
    """ZeRO 1 keeps whole sums while it has micro-batches to add up, in the type of the reduction;
    the reduced parts come as these go."""
    if home.zero == 0:
        return types.gradients * stage.elements
    part = types.gradients * home.parts.largest(stage.elements, stage.expert_elements)
    if home.zero > 1 or home.microbatches == 1:
        return part + (types.reduced * stage.early_elements if home.split else 0)
    experts = 0 if home.gathers_experts else stage.expert_elements
    return types.reduced * (stage.elements - experts) + types.gradients * experts


def gathered_bytes(stage: Stage, home: Residence, types: Types, in_place: bool = False) -> int:
    """Weights in the compute type beyond what is stored, and the buffers of gradient reduction,
    unless that is in place."""
    if home.zero == 0:
        # buckets on their way in another type come later, when activations have made room
        return stage.largest_elements * (types.compute if types.mixed else types.gradients)
    # one unit's gradients as computed and as reduced, while another's are on their way
    experts = home.gathers_experts
    largest, next_largest = stage.largest_units(experts)
    reducing = largest * (types.compute + types.reduced) + next_largest * types.reduced
    reducing = 0 if in_place else reducing
    if home.zero == 3:
        # one unit in use, the next one on its way; the root stays from its forward to its backward
        root = stage.root_elements - (0 if experts else stage.root_expert_elements)
        held = root + sum(stage.largest_repeated(experts))
    else:
        held = stage.elements - (0 if experts else stage.expert_elements)
    return held * types.compute + reducing


@dataclass(frozen=True, slots=True)
class _Moment:
    """Bytes at one moment of a micro-batch's backward. working: of the unit that runs."""

    activations: int = 0
    gradients: int = 0
    working: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.working


def _peak(stage: Stage, casts: tuple[int, int], gradient_bytes: int) -> _Moment:
    """The fullest moment as a micro-batch goes backward: it frees what is kept, block by block, and
    what a block computes again is there while the block runs. `gradient_bytes`: of each weight
    element whose gradient comes meanwhile."""
    alive, made = stage.kept_bytes(*casts), 0
    worst = _Moment()
    for run in reversed(stage.runs):
        held, returning = run.kept_bytes(*casts), run.returning_bytes(*casts)
        for _ in range(run.count):
            now = _Moment(alive + returning, made, run.working_bytes(casts[0]))
            worst = max(worst, now, key=lambda m: m.total)
            alive -= held
            made += gradient_bytes * run.cost.elements
            if not gradient_bytes:  # the uses before it are the same with less alive
                alive -= held * (run.count - 1)
                break
    return max(worst, _Moment(alive, made), key=lambda m: m.total)
