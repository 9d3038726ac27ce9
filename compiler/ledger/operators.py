"""What autograd keeps of one use of each distinct block, operator by operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmspec.compiler.cost.recompute import Flow, Operators, flow_of
from llmspec.compiler.forecast import Priced
from llmspec.compiler.ops import collective
from llmspec.compiler.ops.registry import entry_of
from llmspec.compiler.search.policies import lowered


@dataclass(frozen=True, slots=True)
class Kept:
    """One storage. value: the node that makes it, or flows in; does: its operator; by: those that
    keep it for their backward; statistics: what `value` keeps beside its operands and result."""

    value: str
    does: str
    size_bytes: int
    by: tuple[str, ...]
    statistics: bool = False


def kept_by_operators(known: Priced) -> dict[str, dict[Operators, tuple[Kept, ...]]]:
    """By unit, then by what its uses compute again."""
    space, shape = known.space, known.shape
    option = shape.option
    graph = space.graph(shape.microbatch, option.view)
    found: dict[str, dict[Operators, tuple[Kept, ...]]] = {}
    for name in dict.fromkeys(i.unit for i in graph.instances):
        unit = lowered(graph, option, name)
        flow = flow_of(unit, option.where, space.machine, space.types.compute, option.inner)
        stretches = known.plan.recompute.get(name, ())
        choices = dict.fromkeys(s.again for s in stretches) or {(): None}
        found[name] = {again: tuple(_kept(flow, again)) for again in choices}
    return found


def _kept(flow: Flow, again: Operators) -> list[Kept]:
    runs, values = flow.kept(again)
    items = []
    for value in flow.values():
        if value in values:
            by = tuple(s.name for s in flow.steps.values() if value in s.keeps)
            items.append(Kept(value, _does(flow, value), flow.size_bytes(value), by))
        step = flow.steps.get(value)
        if step is not None and step.extra_bytes and value not in runs:
            items.append(
                Kept(value, _does(flow, value), step.extra_bytes, (value,), statistics=True)
            )
    return items


def _does(flow: Flow, value: str) -> str:
    if value in flow.inputs:
        return "input"
    node = flow.steps[value].node
    if collective.is_collective(node):
        move: collective.Move = node.meta["move"]
        return move.conversion.function
    return entry_of(node).name


def kept_object(found: dict[str, dict[Operators, tuple[Kept, ...]]]) -> list[dict[str, Any]]:
    return [
        {
            "unit": name,
            "again": again if isinstance(again, str) else list(again),
            "kept_bytes": sum(k.size_bytes for k in kept),
            "kept": [
                {
                    "value": k.value,
                    "operator": k.does,
                    "bytes": k.size_bytes,
                    "statistics": k.statistics,
                    "by": list(k.by),
                }
                for k in kept
            ],
        }
        for name, choices in found.items()
        for again, kept in choices.items()
    ]
