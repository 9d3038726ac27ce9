"""Experts on context ranks: each rank chooses for its own tokens, and sends on their rows alone.

Rows are split as the tokens that they come from: `Split(0)` of [R, …]. Counts of them are a rank's
own, so their sum is what all ranks have: `PARTIAL`. Capacity alone looks at whole sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from llmspec.compiler.graph import has_rows
from llmspec.compiler.ops import elementwise
from llmspec.compiler.ops.context import AXIS, elsewhere, not_runnable
from llmspec.compiler.ops.experts import combine, dispatch, grouped_bias, grouped_linear
from llmspec.compiler.ops.registry import (
    CONTEXT_FORMS,
    ContextForm,
    Localised,
    Printed,
    Sends,
    Shapes,
    numel,
)
from llmspec.compiler.ops.routing import (
    choose_experts,
    expert_counts,
    expert_order,
    sequence_load,
)
from llmspec.compiler.placement import PARTIAL, SHADOW, WHOLE, Collective, Split, State


def context_sequence_load(*args: Any) -> Any:
    """`sequence_load` of whole sequences, of which each rank has a part: experts, count."""
    not_runnable(args)


TOKENS, ROWS = Split(1), Split(0)
FORMS: dict[Callable[..., Any], tuple[Callable[..., Any], tuple[State, ...], State]] = {
    choose_experts: (choose_experts, (TOKENS, SHADOW), TOKENS),
    sequence_load: (context_sequence_load, (TOKENS,), WHOLE),
    expert_order: (expert_order, (TOKENS,), ROWS),
    expert_counts: (expert_counts, (TOKENS, SHADOW), PARTIAL),
    dispatch: (dispatch, (TOKENS, ROWS), ROWS),
    grouped_linear: (grouped_linear, (ROWS, SHADOW, PARTIAL), ROWS),
    grouped_bias: (grouped_bias, (ROWS, SHADOW, PARTIAL), ROWS),
    combine: (combine, (ROWS, TOKENS, ROWS), TOKENS),
}
"""What takes an operator's place, where its operands are (a bias may be left out), its result."""


def _form(node: fx.Node, have: tuple[State, ...], ranks: int, style: str) -> ContextForm | None:
    function, operands, result = FORMS[node.target]  # type: ignore[index]
    return ContextForm(
        function=function, arguments=(), operands=operands[: len(have)], result=result
    )


def _row_by_row(
    node: fx.Node, have: tuple[State, ...], ranks: int, style: str
) -> ContextForm | None:
    if not has_rows(node):
        return None
    return ContextForm(
        function=node.target,  # type: ignore[arg-type]
        arguments=(),
        operands=(ROWS,) * len(have),
        result=ROWS,
    )


CONTEXT_FORMS |= dict.fromkeys(FORMS, _form)
CONTEXT_FORMS |= dict.fromkeys(
    (elementwise.multiply, *elementwise.ACTIVATIONS.values()), _row_by_row
)


def _render(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    text = f"sequence_load({args[0]}, experts={node.args[1]}, context={AXIS})"
    return Printed(text, (("runtime.routing", "sequence_load"),))


def _sends(node: fx.Node, shapes: Shapes) -> tuple[Sends, ...]:
    return (
        Sends(
            axis="context",
            kind=Collective.ALL_REDUCE,
            elements_forward=numel(shapes.result),
            elements_backward=0,
        ),
    )


elsewhere(sequence_load, context_sequence_load, _render, sends=_sends)
