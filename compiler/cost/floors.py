"""What no ledger of a stage undercuts, whatever its blocks compute again."""

from __future__ import annotations

from llmspec.compiler.cost.backward import making, working_bytes
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.memory import gathered_bytes, gradient_bytes, software_bytes
from llmspec.compiler.cost.offload import (
    ACTIVATIONS,
    OPTIMIZER,
    PARAMETERS,
    AwayRank,
    Offload,
    crossing_bytes,
)
from llmspec.compiler.cost.passing import passing
from llmspec.compiler.cost.residence import Residence, cast_bytes
from llmspec.compiler.cost.stage import Stage
from llmspec.compiler.cost.turns import Rank
from llmspec.compiler.cost.types import Types


def standing_bytes(
    stage: Stage,
    home: Residence,
    types: Types,
    machine: Machine,
    offload: Offload,
    rank: Rank | None = None,
) -> int:
    """Of the device's ledger, what is there whatever blocks make and free in their backward."""
    elements = home.parts.largest(stage.elements, stage.expert_elements)
    size = gathered_bytes(stage, home, types) + home.message_bytes + machine.fixed_bytes
    if PARAMETERS in offload:
        size += crossing_bytes(stage, home, types, machine, offload)
    else:
        size += types.weights * elements + (0 if OPTIMIZER in offload else types.moments * elements)
        size += software_bytes(stage, home, types, machine)
        if rank is not None:
            size += sum(rank.gradients(home.turns[0]))
        elif not home.first_is_fullest:
            size += gradient_bytes(stage, home, types)
    return size + (round(home.in_flight * stage.output_bytes) if home.sends_on else 0)


def turning(
    stage: Stage, home: Residence, types: Types, machine: Machine, offload: Offload
) -> Rank | None:
    """What bounds ask of a rank whose stages go backward in turn, at the first of its
    turns; None of any other."""
    if not home.turns:
        return None
    rank = AwayRank if ACTIVATIONS in offload else Rank
    return rank(stage, home, types, "gradients" in machine.fused)


def beside_bytes(
    stage: Stage,
    home: Residence,
    types: Types,
    machine: Machine,
    block: int | None = None,
    rank: Rank | None = None,
) -> tuple[int, int]:
    """Besides those and what is kept: as the last micro-batch's backward begins, and the least as
    any unit's goes on. `block`: the least with the backward of the last unit, if that is one that
    may run again."""
    if rank is not None:
        turn = home.turns[0]
        around, stage = rank.around(turn), stage.parts[turn.held.runs]
    else:
        around = passing(stage, home, types, "gradients" in machine.fused)
    last = stage.runs[-1]
    cast, _ = cast_bytes(home, types)
    if block is None:
        block = 0 if last.block else working_bytes(last, home, types, cast, 0)
    ending = making(stage, home, types, cast, around)
    first = max(block + around[0][0][0].total, ending.total if ending else 0)
    least = min(during.total for uses in around for during, _ in uses.values())
    return first, least
