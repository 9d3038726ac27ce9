"""Linear maps: `y[…, o] = Σ_i x[…, i] w[o, i]`, also with a stack of weights `w[n, o, i]`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx
from torch.nn import functional as F

from llmspec.compiler.ops.registry import (
    Entry,
    Localised,
    Printed,
    Rule,
    Saved,
    Shapes,
    index_rule,
    letters,
    numel,
    register,
    shape_of,
)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x […, I], weight [O, I] or [N, O, I] -> […, O] or […, N, O]."""
    if weight.dim() == 2:
        return F.linear(x, weight)
    return F.linear(x, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])


def product_rule(node: fx.Node, weight_dims: str) -> Rule:
    """weight_dims: the weight's letters in order: o, i, and n when it is a stack."""
    x, weight = (shape_of(a) for a in node.args[:2])  # type: ignore[arg-type]
    lead = letters(len(x) - 1, skip="nio")
    stack = ["n"] if "n" in weight_dims else []
    of_weight = dict(zip(weight_dims, weight, strict=True))
    # the order of factors is the order in which placements are tried, whatever the layout
    sizes = dict(zip(lead, x, strict=False)) | {n: of_weight[n] for n in ["o", "i", *stack]}
    left, right = " ".join([*lead, "i"]), " ".join([*lead, *stack, "o"])
    return index_rule(
        f"{left}, {' '.join(weight_dims)} -> {right}",
        sizes,
        whole=frozenset({lead[0], *stack}),
        uneven=frozenset("o"),
        linear=((0,), (1,)),
    )


def printed_product(node: fx.Node, *args: str) -> Printed:
    """The call of a product: x, weight [O, I], perhaps a bias. PyTorch's own, or where the weight's
    gradient comes later the runtime's."""
    if node.meta.get("late"):
        return Printed(f"linear({', '.join(args)})", (("runtime.split_backward", "linear"),))
    return Printed(f"F.linear({', '.join(args)})")


def _render(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    x, weight = args
    shape = shape_of(node.args[1])  # type: ignore[arg-type]
    if len(shape) == 2:
        return printed_product(node, x, weight)
    made = printed_product(node, x, f"{weight}.flatten(0, 1)")
    return Printed(f"{made.text}.unflatten(-1, ({shape[0]}, -1))", made.imports)


def _rule(node: fx.Node) -> Rule:
    return product_rule(node, "noi" if len(shape_of(node.args[1])) == 3 else "oi")  # type: ignore[arg-type]


def product_flops(node: fx.Node, shapes: Shapes) -> float:
    return 2.0 * numel(shapes.result) * shapes.operands[0][-1]


LINEAR = register(
    Entry(
        name="linear",
        function=linear,
        rule=_rule,
        flops=product_flops,
        saved=lambda node, shapes: Saved(operands=(0, 1)),
        render=_render,
        contraction=True,
        late=True,
    )
)
