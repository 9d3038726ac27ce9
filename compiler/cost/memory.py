"""The ledger of one rank: the most bytes alive at once in a steady step, part by part."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from llmspec.compiler.cost.backward import Backwards, Moment, peak_of_one
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.passing import passing
from llmspec.compiler.cost.residence import Residence, cast_bytes, sums_bytes
from llmspec.compiler.cost.stage import Stage
from llmspec.compiler.cost.turns import Rank, in_turns
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


def ledger(stage: Stage, home: Residence, types: Types, machine: Machine) -> Ledger:
    elements = home.parts.largest(stage.elements, stage.expert_elements)
    in_place = "gradients" in machine.fused
    peak = peak_of_rank(stage, home, types, in_place)
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
    """As most is in flight."""
    if home.sums_each_time:
        early = types.reduced * stage.early_elements if home.split else 0
        return early + sums_bytes(stage.elements, stage.expert_elements, home, types)
    # where the first backward is followed as its gradients come, this is of the second
    awaited, of_experts = (0, 0) if home.first_is_fullest else home.awaited
    return sums_bytes(stage.elements - awaited, stage.expert_elements - of_experts, home, types)


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


def peak_of_rank(stage: Stage, home: Residence, types: Types, in_place: bool) -> Moment:
    """With all activations on the device."""
    if home.turns:
        return in_turns(Rank(stage, home, types, in_place))
    return fullest(stage, home, types, backwards(stage, home, types, in_place))


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
        peak = peak_of_one(stage, types, casts, coming, around, home)
        whole = earlier + peak.activations
        return peak._replace(activations=whole, in_flight=in_flight, earlier=earlier)

    return backward
