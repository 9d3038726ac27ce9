"""What kernels of several operators change in the cost of a unit."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from llmspec.compiler.cost.compute import is_integer, operator_cost
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.recompute import Flow
from llmspec.compiler.cost.unit import UnitCost
from llmspec.compiler.graph import Unit
from llmspec.compiler.ops import collective
from llmspec.compiler.ops.registry import entry_of, numel, shape_of, shapes_of, tensor_operands


@dataclass(frozen=True, slots=True, kw_only=True)
class Computing:
    """Of a lowered unit's operators: seconds of each pass, bytes of the worst one's backward,
    elements of the weights that its backward reads."""

    forward_s: float
    backward_s: float
    working_bytes: int
    cast_elements: int

    @property
    def whole_s(self) -> float:
        return self.forward_s + self.backward_s


def computing(unit: Unit, machine: Machine, width: int) -> Computing:
    calls = [n for n in unit.calls() if not collective.is_collective(n)]
    costs = [operator_cost(n, shapes_of(n), machine, width) for n in calls]
    read = {
        tensor_operands(n)[i]
        for n, cost in zip(calls, costs, strict=True)
        for i in cost.saved.operands
    }
    weights = {str(r.target): r for r in map(_root, read) if r.op == "get_attr"}
    return Computing(
        forward_s=sum(c.forward_s for c in costs),
        backward_s=sum(c.backward_s for c in costs),
        working_bytes=max((c.working_bytes for c in costs), default=0),
        cast_elements=sum(numel(shape_of(w)) for w in weights.values() if not is_integer(w)),
    )


def _root(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and not collective.is_collective(node):
        if not entry_of(node).alias:
            break
        node = tensor_operands(node)[0]
    return node


def with_kernels(
    cost: UnitCost, apart: tuple[Flow, Computing], fused: tuple[Flow, Computing]
) -> UnitCost:
    """`cost`: of the unit with its operators apart. On devices without Triton kernels run as plain
    functions: they keep less, and take no less time."""
    (flow, before), (fused_flow, after) = apart, fused
    kept, left = flow.again(()), fused_flow.again(())
    quicker = flow.machine.pinned
    return replace(
        cost,
        forward_s=cost.forward_s + quicker * (after.forward_s - before.forward_s),
        backward_s=cost.backward_s + quicker * (after.backward_s - before.backward_s),
        working_bytes=cost.working_bytes + after.working_bytes - before.working_bytes,
        saved_bytes=cost.saved_bytes + left.kept_bytes - kept.kept_bytes,
        away_bytes=cost.away_bytes + left.away_bytes - kept.away_bytes,
        away_host_bytes=cost.away_host_bytes + left.away_host_bytes - kept.away_host_bytes,
        cast_elements=cost.cast_elements + after.cast_elements - before.cast_elements,
    )
