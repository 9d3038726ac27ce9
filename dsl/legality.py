"""Whether any plan of a spec can keep all lines of its `plan` block."""

from __future__ import annotations

from collections.abc import Callable

from llmspec.dsl import data_pins, expert_pins, mesh_pins, pipeline_pins
from llmspec.dsl.diagnostics import Fault, fault
from llmspec.dsl.pins import Pins
from llmspec.dsl.program import Constraint, Relation


def contradictions(pins: Pins) -> None:
    """Two lines about one key that no value satisfies."""
    for index, one in enumerate(pins.constraints):
        for other in pins.constraints[:index]:
            if one.key == other.key and not compatible(one, other):
                raise fault(
                    "E0407",
                    f"no `{one.key}` satisfies both lines",
                    one.span,
                    "this one",
                    secondary=((other.span, "and this one"),),
                )


def compatible(one: Constraint, other: Constraint) -> bool:
    for a, b in ((one, other), (other, one)):
        if a.relation in (Relation.EQ, Relation.IN):
            return any(b.allows(v) for v in a.values)
    if one.relation == other.relation:
        return True
    low, high = (one, other) if one.relation == Relation.GE else (other, one)
    return low.values[0] <= high.values[0]  # type: ignore[operator]


RULES: tuple[Callable[[Pins], None], ...] = (
    contradictions,
    mesh_pins.tensor_splits_heads,
    expert_pins.experts_are_shared,
    mesh_pins.axes_fill_world,
    pipeline_pins.stages_cut_blocks,
    pipeline_pins.blocks_fill_stages,
    pipeline_pins.schedule_takes_stages,
    data_pins.shards_are_data,
    data_pins.zero_needs_ranks,
    mesh_pins.sequence_needs_tensor,
    mesh_pins.context_splits_tokens,
    mesh_pins.ulysses_splits_heads,
    data_pins.parameters_are_sharded,
    data_pins.experts_have_copies,
    data_pins.batch_divides,
)


def check_pins(pins: Pins) -> list[Fault]:
    faults: list[Fault] = []
    for rule in RULES:
        try:
            rule(pins)
        except Fault as error:
            spans = [f.diagnostic.span for f in faults]
            if error.diagnostic.span not in spans:  # one line, one message
                faults.append(error)
            if rule is contradictions:
                break  # what follows would read only one of the two
    return faults
