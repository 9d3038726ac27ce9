"""A group of operators as an operator of its own: the target of a node in a fused graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import fx

from llmspec.compiler.errors import InternalError
from llmspec.compiler.graph import Unit
from llmspec.compiler.kernels.group import Group, formula_of
from llmspec.compiler.kernels.kinds import INDUCTOR, TRITON
from llmspec.compiler.ops.registry import (
    Entry,
    Localised,
    Printed,
    Rule,
    Saved,
    entry_of,
    shapes_of,
)


@dataclass(eq=False)
class Kernel:
    """Calls of one kernel at one place of a unit."""

    group: Group
    entry: Entry

    @staticmethod
    def of(
        group: Group, by: str = TRITON, rates: tuple[float | None, float | None] = (None, None)
    ) -> Kernel:
        """`by`: what makes it. `rates`: bytes/s that were measured of it, forward and backward."""
        again = (lambda width: group.read_again_bytes(width)) if by == INDUCTOR else lambda _: 0
        entry = Entry(
            name=group.name,
            rates=rates,
            function=_never,
            rule=_no_rule,
            flops=lambda node, shapes: sum(_flops(n) for n in group.members),
            saved=lambda node, shapes: _saved(group),
            render=lambda node, args, local: _render(group, args),
            buffers=lambda node, shapes, width: (
                (len(group.outputs) - 1) * group.rows * group.columns * width
            ),
            moved=lambda node, shapes, width, fused: (
                float(group.forward_bytes(width)),
                float(group.backward_bytes(width) + again(width)),
            ),
        )
        return Kernel(group, entry)

    @property
    def __name__(self) -> str:
        return self.group.name

    def __call__(self, *_: Any) -> NoReturn:
        _never()


class Pick:
    """One of several results of a kernel."""

    __name__ = "pick"

    def __init__(self) -> None:
        self.entry = Entry(
            name="pick",
            function=_never,
            rule=_no_rule,
            flops=lambda node, shapes: 0.0,
            saved=lambda node, shapes: Saved(),
            render=lambda node, args, local: Printed(f"{args[0]}[{args[1]}]"),
            alias=True,
        )

    def __call__(self, *_: Any) -> NoReturn:
        _never()


def groups_in(unit: Unit) -> Iterator[Group]:
    """Of each call of a kernel in a fused unit."""
    for node in unit.calls():
        if isinstance(node.target, Kernel):
            yield node.target.group


def _never(*_: Any) -> NoReturn:
    raise InternalError("a kernel is emitted, never run inside the compiler")


def _no_rule(node: fx.Node) -> Rule:
    raise InternalError("operators are placed before they are fused")


def _flops(node: fx.Node) -> float:
    return entry_of(node).flops(node, shapes_of(node))


def _saved(group: Group) -> Saved:
    """Results that are kept are the picks' own business where there are several."""
    given = [i for i in group.inputs if i.node is not None]
    inside = [(e, group.elements(e)) for e in group.kept_inside]
    return Saved(
        operands=tuple(k for k, i in enumerate(given) if i in group.kept_inputs),
        result=len(group.outputs) == 1 and bool(group.kept_outputs),
        extra_elements=sum(n for e, n in inside if e.columns),
        extra_bytes=sum(4 * n for e, n in inside if not e.columns),
    )


def _render(group: Group, args: Sequence[str]) -> Printed:
    """The call: tensors in order, then what the extras are made of."""
    given = [i for i in group.inputs if i.node is not None]
    texts = list(args[: len(given)])
    like = next(t for t, i in zip(texts, given, strict=True) if i.place.full and i.place.columns)
    imports: list[tuple[str, str]] = [("", "kernels")]
    drawn = list(args[len(given) :])
    for node in sorted(group.members, key=lambda n: formula_of(n).draws):  # a mask comes last
        formula = formula_of(node)
        local = node.meta.get("localised", Localised())
        # the mask is asked for by the shape of what it falls on, rotary tables by the operand's
        numbers = [a if isinstance(a, fx.Node) else repr(a) for a in node.args]
        mask = drawn if formula.draws else []
        own = [like, *mask, *map(str, numbers[len(mask) + 1 :])]
        found = formula.given(node, own, local)
        texts += found.texts
        imports += found.imports
    return Printed(f"kernels.{group.name}({', '.join(texts)})", tuple(imports))


pick = Pick()
