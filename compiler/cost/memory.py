"""The ledger of one rank: the most bytes alive at once in a steady step, part by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from llmspec.compiler.cost.data import bucket_elements
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
    def gathers_experts(self) -> bool:
        """Experts that one rank alone has stay as they are whatever the level."""
        return self.zero > 0 and self.expert_shards > 1


def ledger(stage: Stage, home: Residence, types: Types, machine: Machine) -> Ledger:
    """The peak stands at the start of the last backward that finds all micro-batches in flight:
    gradients of earlier ones are there already. One micro-batch on one data rank is walked block by
    block instead."""
    elements = home.parts.largest(stage.elements, stage.expert_elements)
    cast = types.compute if types.mixed and home.zero == 0 else 0
    of_experts = types.compute if types.mixed and not home.gathers_experts else 0
    kept = stage.kept_bytes(cast, of_experts) + (stage.output_bytes if home.sends_on else 0)
    activations = round(home.in_flight * kept) + stage.recomputed_bytes(cast, of_experts)
    gradients = _gradient_bytes(stage, home, types)
    if home.zero == 0 and home.data == 1 and home.microbatches == 1:
        activations, gradients = _walk(stage, types, cast)
    return Ledger(
        parameters=types.weights * elements,
        gradients=gradients,
        optimizer=types.moments * elements,
        activations=activations,
        buffers=_gathered_bytes(stage, home, types) + stage.working_bytes,
        fixed=machine.fixed_bytes,
    )


def _gradient_bytes(stage: Stage, home: Residence, types: Types) -> int:
    """ZeRO 1 keeps whole sums while it has micro-batches to add up, in the type of the reduction,
    and the reduced parts beside them."""
    if home.zero == 0:
        return types.gradients * stage.elements
    part = types.gradients * home.parts.largest(stage.elements, stage.expert_elements)
    if home.zero > 1 or home.microbatches == 1:
        return part + (types.reduced * stage.early_elements if home.split else 0)
    summed = stage.elements if home.gathers_experts else stage.elements - stage.expert_elements
    return types.reduced * summed + part


def _gathered_bytes(stage: Stage, home: Residence, types: Types) -> int:
    """Weights in the compute type beyond what is stored, and the buffers of gradient reduction."""
    if home.zero == 0:
        own = stage.largest_elements * (types.compute if types.mixed else types.gradients)
        return own + _copied_bytes(stage, home, types)
    # one unit's gradients as computed and as reduced, while another's are on their way
    experts = home.gathers_experts
    largest, next_largest = stage.largest_units(experts)
    reducing = largest * (types.compute + types.reduced) + next_largest * types.reduced
    if home.zero == 3:
        # one unit in use, the next one on its way; the root stays from its forward to its backward
        root = stage.root_elements - (0 if experts else stage.root_expert_elements)
        held = root + sum(stage.largest_repeated(experts))
    else:
        held = stage.elements - (0 if experts else stage.expert_elements)
    return held * types.compute + reducing


def _copied_bytes(stage: Stage, home: Residence, types: Types) -> int:
    """Buckets on their way in another type than gradients are kept in: two at a time."""
    if home.data == 1 or types.reduced == types.gradients:
        return 0
    return 2 * types.reduced * bucket_elements(stage.elements, types)


def _walk(stage: Stage, types: Types, cast: int) -> tuple[int, int]:
    """(activations, gradients) where their sum is largest as the backward frees the one and makes
    the other."""
    alive = stage.kept_bytes(cast)
    made, worst = 0, (-1, 0, 0)
    for run in reversed(stage.runs):
        kept = run.cost.saved_bytes + cast * run.cost.cast_elements
        held = run.cost.input_bytes if run.recompute else kept
        for _ in range(run.count):
            now = alive + (kept if run.recompute else 0)
            worst = max(worst, (now + made, now, made))
            alive -= held
            made += types.gradients * run.cost.elements
    worst = max(worst, (alive + made, alive, made))
    return worst[1], worst[2]
