"""What published software keeps in another way than emitted programs do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import fx

from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.ops.registry import entry_of, numel, shape_of, tensor_operands
from llmspec.compiler.placement import Collective, State, conversion, local_shape

GATE = "gate"


def in_gate(node: fx.Node, machine: Machine) -> bool:
    """An activation that a product of values alone reads, and that is computed inside of it where
    the software has one kernel for both: nothing is kept of it."""
    if GATE not in machine.fused or node.op != "call_function" or len(node.users) != 1:
        return False
    reader = next(iter(node.users))
    alone = entry_of(node).formula is not None and len(tensor_operands(node)) == 1
    return alone and reader.op == "call_function" and entry_of(reader).name == "multiply"


def gathered(have: State, want: State) -> bool:
    step = conversion(have, want)
    return step is not None and step.forward is Collective.ALL_GATHER


def product_shapes(
    calls: Iterable[fx.Node], states: Mapping[str, State], ranks: int
) -> frozenset[tuple[int, int]]:
    """Of weights on one rank, (columns, depth); of experts, one's. Products of one value are one
    product."""
    columns: Counter[tuple[fx.Node, int]] = Counter()
    for node in calls:
        entry, weight = entry_of(node), tensor_operands(node)[-1]
        if not entry.contraction or weight.op != "get_attr":
            continue
        shape = local_shape(shape_of(weight), states[str(weight.target)], ranks)
        of_one = shape if entry.groups is None else shape[1:]
        columns[tensor_operands(node)[0], shape[-1]] += numel(of_one) // shape[-1]
    return frozenset((count, depth) for (_, depth), count in columns.items())
