"""What autograd keeps of one use of each distinct block, operator by operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from llmspec.compiler.cost.recompute import Flow, Operators
from llmspec.compiler.forecast import Priced
from llmspec.compiler.kernels.kernel import Kernel, pick
from llmspec.compiler.kernels.kinds import EAGER
from llmspec.compiler.kernels.naming import kernel_name
from llmspec.compiler.ops import collective
from llmspec.compiler.ops.registry import entry_of
from llmspec.compiler.passes.fuse import PICKED
from llmspec.compiler.passes.recompute import in_words


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
    policies = space.chain.policies
    for name in dict.fromkeys(i.unit for i in graph.instances):
        stretches = known.plan.recompute.get(name, ())
        found[name] = {}
        for again in dict.fromkeys(s.again for s in stretches) or {(): None}:
            if option.kernels == EAGER:
                flow = policies.flow(option, shape.microbatch, name)
            else:
                flow, _ = policies.fused(option, shape.microbatch, name, again)
            found[name][again] = tuple(_kept(flow, again))
    return found


def _kept(flow: Flow, again: Operators) -> list[Kept]:
    known = again if isinstance(again, str) else tuple(n for n in again if n in flow.steps)
    runs, values = flow.kept(known)
    items = []
    for value in flow.values():
        name = value.removesuffix(PICKED)
        if value in values:
            keepers = [s.name.removesuffix(PICKED) for s in flow.steps.values() if value in s.keeps]
            by = tuple(dict.fromkeys(keepers))
            items.append(Kept(name, _does(flow, value), flow.size_bytes(value), by))
        step = flow.steps.get(value)
        if step is not None and step.extra_bytes and value not in runs:
            items.append(Kept(name, _does(flow, value), step.extra_bytes, (name,), statistics=True))
    return items


def _does(flow: Flow, value: str) -> str:
    if value in flow.inputs:
        return "input"
    node = flow.steps[value].node
    if collective.is_collective(node):
        move: collective.Move = node.meta["move"]
        return move.conversion.function
    kernel = node.args[0] if node.target is pick else node
    if isinstance(kernel, fx.Node) and isinstance(kernel.target, Kernel):
        return kernel_name(kernel.target.group)
    return entry_of(node).name


def kept_object(known: Priced) -> list[dict[str, Any]]:
    """words: what is computed again, by the names of the spec."""
    shape, policies = known.shape, known.space.chain.policies
    return [
        {
            "unit": name,
            "again": again if isinstance(again, str) else list(again),
            "words": in_words(policies.unit(shape.option, shape.microbatch, name), again),
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
        for name, choices in kept_by_operators(known).items()
        for again, kept in choices.items()
    ]
