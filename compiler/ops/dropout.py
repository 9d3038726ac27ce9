"""Dropout whose mask is a function of the seed, the operator and the global position alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, fx

from llmspec.compiler.ops.formula import Expr, Extra, Formula, Given, Maker
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


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a sample's tensor a rank has. starts: where it begins, printed; whole: the
    tensor's dimensions."""

    starts: tuple[str, ...]
    whole: tuple[int, ...]
    imports: tuple[tuple[str, str], ...] = ()


def _part(node: fx.Node, args: Sequence[str], local: Localised) -> Part:
    whole = local.whole_result[1:]
    starts = ["0"] * len(whole)
    if local.factor:
        dim = int(local.factor[1:])
        starts[dim - 1] = f"{local.axis}.rank * {args[0]}.shape[{dim}]"
    return Part(tuple(starts), whole)


def printed(node: fx.Node, args: Sequence[str], part: Part) -> Printed:
    text = f"dropout({args[0]}, {args[2]}, {args[1]}, {_options(node, part)})"
    return Printed(text, (("runtime.random", "dropout"), *part.imports))


def given(node: fx.Node, args: Sequence[str], part: Part) -> Given:
    """What a kernel draws the mask from."""
    text = f"Mask.of({args[0]}, {args[2]}, {args[1]}, {_options(node, part)})"
    return Given((text,), (("runtime.random", "Mask"), *part.imports))


def _options(node: fx.Node, part: Part) -> str:
    return (
        f"operator={_number(node)}, seed=SEED, start={_tuple(part.starts)}, "
        f"shape={part.whole}, training=self.training"
    )


def _number(node: fx.Node) -> str:
    return f"self.first_dropout + {node.args[3]}" if node.args[3] else "self.first_dropout"


def _tuple(parts: Sequence[str]) -> str:
    return f"({parts[0]},)" if len(parts) == 1 else f"({', '.join(parts)})"


def _extras(node: fx.Node) -> tuple[Extra, ...]:
    last = len(shape_of(node)) - 1
    return (
        Extra(name="samples", per=(0, 1), columns=False, integer=True, drawn=True),
        Extra(name="places", per=(1, last), columns=False, integer=True, drawn=True),
    )


def _keep(m: Maker, x: Sequence[Expr]) -> Expr:
    """0 where it drops, what the rest is scaled with elsewhere."""
    return m.make("keep", x[-2:], rows=True, columns=True).named("keep")


def formula(part: Callable[[fx.Node, Sequence[str], Localised], Part]) -> Formula:
    return Formula(
        value=lambda node, m, x: x[0] * _keep(m, x),
        gradient=lambda node, m, x, y, g: (g * _keep(m, x),),
        extras=_extras,
        given=lambda node, args, local: given(node, args, part(node, args, local)),
        draws=True,
    )


register(
    Entry(
        name="dropout",
        function=dropout,
        rule=_rule,
        flops=lambda node, shapes: 2.0 * numel(shapes.result),
        saved=lambda node, shapes: Saved(extra_bytes=numel(shapes.result)),
        render=lambda node, args, local: printed(node, args, _part(node, args, local)),
        formula=formula(_part),
    )
)
