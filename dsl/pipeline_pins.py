"""Whether a pipeline's ranks, stages and schedule fit each other and the model's blocks."""

from __future__ import annotations

from llmspec.dsl.diagnostics import fault, listing
from llmspec.dsl.options import STAGES_ON_A_RANK
from llmspec.dsl.parameters import count_blocks
from llmspec.dsl.pins import Pins
from llmspec.dsl.program import Model


def stages_cut_blocks(pins: Pins) -> None:
    if not isinstance(pins.model, Model):
        return
    blocks = count_blocks(pins.model)
    pin = pins.pinned("pipeline")
    ranks = pins.number("pipeline")
    if pin and ranks and ranks > max(1, blocks):
        raise fault(
            "E0405",
            f"{ranks} pipeline ranks cannot share {blocks} blocks",
            pin.span,
            "every rank holds at least one block",
            helps=(f"at most `pipeline = {max(1, blocks)}`",),
        )
    stages = pins.pinned("stages")
    if stages is None:
        return
    cut = stages.values[0]
    assert isinstance(cut, tuple), "stages is a list"
    total = sum(n for n in cut if isinstance(n, int))
    if total != blocks:
        raise fault("E0406", f"the stages hold {total} blocks, the model has {blocks}", stages.span)
    each = pins.number("interleave")
    if pin and ranks and (len(cut) % ranks or (each and len(cut) != ranks * each)):
        on_each = f" with {each} stages each" if each and each > 1 else ""
        raise fault(
            "E0406",
            f"{len(cut)} stages for {ranks} pipeline ranks{on_each}",
            stages.span,
            secondary=[(s, "pinned here") for s in pins.spans(["pipeline", "interleave"])],
        )


def blocks_fill_stages(pins: Pins) -> None:
    ranks, each = pins.number("pipeline"), pins.number("interleave")
    pin = pins.pinned("interleave")
    if not (isinstance(pins.model, Model) and ranks and each and pin):
        return
    blocks = count_blocks(pins.model)
    if each > 1 and ranks * each > blocks:
        raise fault(
            "E0405",
            f"{ranks} pipeline ranks with {each} stages each cannot share {blocks} blocks",
            pin.span,
            "every stage holds at least one block",
            secondary=[(s, "pinned here") for s in pins.spans(["pipeline"])],
        )


def schedule_takes_stages(pins: Pins) -> None:
    """How many stages a rank has: pinned, or what the cuts and the ranks say."""
    schedule, ranks = pins.pinned("schedule"), pins.number("pipeline")
    each, said = pins.number("interleave"), pins.pinned("interleave")
    cuts = pins.pinned("stages")
    if each is None and cuts and ranks and isinstance(cuts.values[0], tuple):
        each, said = len(cuts.values[0]) // ranks, cuts
    if each is None or said is None:
        return
    if ranks == 1 and each > 1:
        raise fault(
            "E0407",
            f"{each} stages on each rank of a pipeline, and there is one rank",
            said.span,
            secondary=[(s, "pinned here") for s in pins.spans(["pipeline"])],
        )
    if schedule is None or (ranks == 1 and each == 1):
        return
    name = str(schedule.values[0])
    fewest, most = STAGES_ON_A_RANK[name]
    if each >= fewest and (most is None or each <= most):
        return
    wanted = str(fewest) if fewest == most else f"at least {fewest}"
    fitting = [w for w, (low, high) in STAGES_ON_A_RANK.items() if low <= each <= (high or each)]
    raise fault(
        "E0407",
        f"`schedule = {name}` needs {wanted} stage{'s' * (fewest > 1)} on each pipeline rank, "
        f"not {each}",
        said.span,
        secondary=((schedule.span, "pinned here"),),
        helps=(f"use `interleave = {fewest}`, or " + listing(f"schedule = {w}" for w in fitting),),
    )
