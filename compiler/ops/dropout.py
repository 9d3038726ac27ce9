"""Dropout whose mask is a function of the seed, the operator and the global position alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar

from torch import Tensor, fx

from llmspec.compiler.ops.registry import (
    Entry,
    Localised,
    Printed,
    Rule,
    Saved,
    numel,
    register,
    shape_of,
)

MASKS: ContextVar[Callable[[Tensor, float, Tensor, int], Tensor] | None] = ContextVar("masks")
"""What draws the masks when the reference runs: f(x, p, samples, operator) -> dropped x."""


def dropout(x: Tensor, samples: Tensor, p: float, operator: int) -> Tensor:
    """x [B, …], samples [B] global sample counters -> x with a share p dropped, the rest scaled up.

    Off (the identity) where no generator is bound: `MASKS` is bound by what runs the reference.
    """
    draw = MASKS.get(None)
    return x if draw is None else draw(x, p, samples, operator)


def _rule(node: fx.Node) -> Rule:
    shape = shape_of(node)
    names = [f"d{i}" for i in range(len(shape))]
    dims = tuple((n,) for n in names)
    return Rule(
        operands=(dims, (("d0",),)),
        result=dims,
        sizes=dict(zip(names, shape, strict=True)),
        whole=frozenset({"d0"}),
        linear=((0,),),
        integer=frozenset({1}),
    )


def _render(node: fx.Node, args: Sequence[str], local: Localised) -> Printed:
    whole = local.whole_result[1:]
    starts = ["0"] * len(whole)
    if local.factor:
        dim = int(local.factor[1:])
        starts[dim - 1] = f"{local.axis}.rank * {args[0]}.shape[{dim}]"
    return printed(node, args, starts, whole)


def printed(
    node: fx.Node,
    args: Sequence[str],
    starts: Sequence[str],
    whole: tuple[int, ...],
    imports: tuple[tuple[str, str], ...] = (),
) -> Printed:
    """`starts`, `whole`: of a sample's dimensions."""
    text = (
        f"dropout({args[0]}, {args[2]}, {args[1]}, operator={_number(node)}, seed=SEED, "
        f"start={_tuple(starts)}, shape={whole}, training=self.training)"
    )
    return Printed(text, (("runtime.random", "dropout"), *imports))


def _number(node: fx.Node) -> str:
    return f"self.first_dropout + {node.args[3]}" if node.args[3] else "self.first_dropout"


def _tuple(parts: Sequence[str]) -> str:
    return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"


register(
    Entry(
        name="dropout",
        function=dropout,
        rule=_rule,
        flops=lambda node, shapes: 2.0 * numel(shapes.result),
        saved=lambda node, shapes: Saved(extra_bytes=numel(shapes.result)),
        render=_render,
    )
)
