"""What a split backward leaves for later: the gradients of weights that products multiply with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from llmspec.compiler.graph import Unit
from llmspec.compiler.ops.registry import late_weight, tensor_operands

Storage = tuple[fx.Node, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """Of one unit and one micro-batch. seconds: of the backward. size_bytes: of the operands and
    gradients that are kept for it. early_elements: of parameters whose gradients do not wait."""

    seconds: float = 0.0
    size_bytes: int = 0
    early_elements: int = 0


NOTHING_LATE = Late()


def late_of(
    unit: Unit,
    backward_s: Mapping[fx.Node, float],
    elements: Mapping[str, int],
    storage: Callable[[fx.Node, int], Storage],
    bytes_of: Callable[[fx.Node, int | None], int],
) -> Late:
    """storage(node, i): whose bytes hold operand i of a node; bytes_of(node, i): how many those
    are, i None: of the result."""
    products = [n for n in unit.calls() if late_weight(n) is not None]
    operands = {storage(n, 0): bytes_of(n, 0) for n in products}
    waiting = {str(late_weight(n).target) for n in products}  # type: ignore[union-attr]
    return Late(
        # a product's backward is two products of the same size
        seconds=sum(backward_s[n] / len(tensor_operands(n)) for n in products),
        size_bytes=sum(operands.values()) + sum(bytes_of(n, None) for n in products),
        early_elements=sum(e for p, e in elements.items() if p not in waiting),
    )
