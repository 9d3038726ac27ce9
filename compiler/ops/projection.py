"""Linear maps whose weight stands input first: `y[…, o] = Σ_i x[…, i] w[i, o]`, also a stack."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from llmspec.compiler.ops.linear import printed_product, product_flops, product_rule
from llmspec.compiler.ops.registry import (
    Entry,
    Localised,
    Printed,
    Rule,
    Saved,
    register,
    shape_of,
)


def projection(x: Tensor, weight: Tensor) -> Tensor:
    """x […, I], weight [I, O] or [I, N, O] -> […, O] or […, N, O]."""
    if weight.dim() == 2:
        return x @ weight
    return (x @ weight.flatten(1)).unflatten(-1, weight.shape[1:])


def _rule(node: fx.Node) -> Rule:
    return product_rule(node, "ino" if len(shape_of(node.args[1])) == 3 else "io")  # type: ignore[arg-type]


def _render(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    x, weight = args
    shape = shape_of(node.args[1])  # type: ignore[arg-type]
    if node.meta.get("late"):
        turned = f"{weight}.t()" if len(shape) == 2 else f"{weight}.flatten(1).t()"
        made = printed_product(node, x, turned)
        unflatten = "" if len(shape) == 2 else f".unflatten(-1, ({shape[1]}, -1))"
        return Printed(made.text + unflatten, made.imports)
    if len(shape) == 2:
        return Printed(f"{x} @ {weight}")
    return Printed(f"({x} @ {weight}.flatten(1)).unflatten(-1, ({shape[1]}, -1))")


register(
    Entry(
        name="projection",
        function=projection,
        rule=_rule,
        flops=product_flops,
        saved=lambda node, shapes: Saved(operands=(0, 1)),
        render=_render,
        contraction=True,
        late=True,
    )
)
