"""The ledger of one rank: the most bytes alive at once in a steady step, part by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.stage import Stage
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

    in_flight: micro-batches whose activations a stage holds at once.
    sends_on: the stage's output goes to another rank, and is kept for its backward.
    """

    zero: int
    data: int
    shards: int
    microbatches: int
    in_flight: int
    sends_on: bool


def ledger(stage: Stage, home: Residence, types: Types, machine: Machine) -> Ledger:
    """The peak stands at the start of the last backward that finds all micro-batches in flight:
    gradients of earlier ones are there already. One micro-batch on one data rank is walked block by
    block instead."""
    shards = home.shards if home.zero else 1
    elements = -(-stage.elements // shards)
    cast = types.compute if types.mixed and home.zero == 0 else 0
    kept = stage.kept_bytes(cast) + (stage.output_bytes if home.sends_on else 0)
    activations = home.in_flight * kept + stage.recomputed_bytes(cast)
    gradients = types.gradients * _gradient_elements(stage, home)
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


def _gradient_elements(stage: Stage, home: Residence) -> int:
    """ZeRO 1 keeps whole sums while it has micro-batches to add up, and the reduced parts beside
    them."""
    if home.zero == 0:
        return stage.elements
    part = -(-stage.elements // home.shards)
    return stage.elements + part if home.zero == 1 and home.microbatches > 1 else part


def _gathered_bytes(stage: Stage, home: Residence, types: Types) -> int:
    """Weights in the compute type beyond what is stored, and the buffers of gradient reduction."""
    if home.zero == 0:
        return stage.largest_elements * (types.compute if types.mixed else types.gradients)
    # one unit's gradients as computed and as reduced, while another's are on their way
    largest, next_largest = stage.largest_units
    reducing = largest * (types.compute + types.gradients) + next_largest * types.gradients
    if home.zero == 3:
        # one unit in use, the next one on its way; the root stays from its forward to its backward
        held = stage.root_elements + sum(stage.largest_repeated)
    else:
        held = stage.elements
    return held * types.compute + reducing


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
