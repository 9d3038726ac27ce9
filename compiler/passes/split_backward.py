"""Marks the products whose weights' gradients a split backward leaves for later."""

from __future__ import annotations

from llmspec.compiler.graph import Unit
from llmspec.compiler.ops.registry import late_weight


def leave_weights_for_later(unit: Unit) -> None:
    """before: F.linear(x, local(self.weight))   after: linear(x, local(self.weight))

    Everything else computes the gradients of its parameters with those of its inputs.
    """
    for node in unit.calls():
        if late_weight(node) is not None:
            node.meta["late"] = True
