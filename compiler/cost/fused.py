"""What kernels of several operators change in the cost of a unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from llmspec.compiler.cost.compute import OperatorCost, is_integer, operator_cost
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.recompute import Flow
from llmspec.compiler.cost.unit import UnitCost
from llmspec.compiler.graph import Unit
from llmspec.compiler.kernels.group import WIDE, Group
from llmspec.compiler.kernels.kernel import Kernel
from llmspec.compiler.kernels.kinds import EAGER, INDUCTOR, TRITON
from llmspec.compiler.ops import collective
from llmspec.compiler.ops.formula import Expr, in_order
from llmspec.compiler.ops.registry import entry_of, numel, shape_of, shapes_of, tensor_operands


def worth_weighing(kinds: Sequence[str], machine: Machine) -> tuple[str, ...]:
    """Of what may run the operators, less what loses to another in every plan.

    On GPUs a group is formed only where it moves fewer bytes, so that a plan with kernels takes no
    longer than the same plan without, and keeps no more; of the same groups inductor's move as
    many bytes as ours or more. CPUs run the plain functions of our kernels, which take longer than
    PyTorch's operators and keep less: neither wins everywhere. Inductor gained nothing on a CPU
    (a step of a small GPT took 101 ms, 107 without), and a minute goes by until it has compiled.
    Where kernels of ours were measured on the device, their rates are their own: all are weighed.
    """
    if machine.pinned and machine.kernels.kernels:
        return tuple(kinds)
    order = (TRITON, INDUCTOR, EAGER) if machine.pinned else (EAGER, TRITON, INDUCTOR)
    found = [k for k in order if k in kinds]
    if machine.pinned or found[:2] != [EAGER, TRITON]:
        return tuple(found[:1])
    return EAGER, TRITON


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
    costs = [_cost(n, machine, width) for n in calls]
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


def _cost(node: fx.Node, machine: Machine, width: int) -> OperatorCost:
    cost = operator_cost(node, shapes_of(node), machine, width)
    if machine.pinned or not isinstance(node.target, Kernel):
        return cost
    # a CPU runs its plain function: in the wide type, one expression after the other
    group = node.target.group
    apart = [operator_cost(n, shapes_of(n), machine, width) for n in group.members]
    forward = plain_s(group.written, group, machine, width)
    backward = plain_s(group.distinct_gradients, group, machine, width)
    return replace(
        cost,
        forward_s=max(forward, sum(c.forward_s for c in apart)),
        backward_s=max(backward, sum(c.backward_s for c in apart)),
    )


def plain_s(roots: Sequence[Expr], group: Group, machine: Machine, width: int) -> float:
    """Of expressions that PyTorch computes one by one."""
    made = [e for e in in_order(roots) if e.op not in ("leaf", "number")]
    values = sum(group.elements(v) for e in made for v in (e, *e.args) if v.op != "number")
    moved = max(width, WIDE) * values
    return moved / machine.memory_bytes_per_s + len(made) * machine.launch_s


def _root(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and not collective.is_collective(node):
        if not entry_of(node).alias:
            break
        node = tensor_operands(node)[0]
    return node


def with_kernels(
    cost: UnitCost, apart: tuple[Flow, Computing], fused: tuple[Flow, Computing]
) -> UnitCost:
    """`cost`: of the unit with its operators apart."""
    (flow, before), (fused_flow, after) = apart, fused
    kept, left = flow.again(()), fused_flow.again(())
    return replace(
        cost,
        forward_s=cost.forward_s + after.forward_s - before.forward_s,
        backward_s=cost.backward_s + after.backward_s - before.backward_s,
        working_bytes=cost.working_bytes + after.working_bytes - before.working_bytes,
        moments=left.moments,
        saved_bytes=cost.saved_bytes + left.kept_bytes - kept.kept_bytes,
        away_bytes=cost.away_bytes + left.away_bytes - kept.away_bytes,
        away_host_bytes=cost.away_host_bytes + left.away_host_bytes - kept.away_host_bytes,
        cast_elements=cost.cast_elements + after.cast_elements - before.cast_elements,
    )
