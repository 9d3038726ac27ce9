"""What context ranks run in place of operators that must know where their tokens stand, and the
two moves between a part of the tokens and all of them.

A context rank holds tokens in the order of `runtime/context.py`. These operators stand in graphs of
one rank; they are printed, and run by the emitted program alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import fx

from llmspec.compiler.errors import InternalError
from llmspec.compiler.graph import without_gradient
from llmspec.compiler.ops import dropout as dropouts
from llmspec.compiler.ops.attention import rotary, turning
from llmspec.compiler.ops.dropout import dropout
from llmspec.compiler.ops.embedding import positions
from llmspec.compiler.ops.formula import Formula
from llmspec.compiler.ops.registry import (
    CONTEXT_FORMS,
    REGISTRY,
    ContextForm,
    Entry,
    Localised,
    MakeForm,
    Printed,
    Rule,
    Saved,
    Sends,
    Shapes,
    numel,
    register,
    shape_of,
)
from llmspec.compiler.ops.weights import masked_softmax, softmax
from llmspec.compiler.placement import SHADOW, WHOLE, Collective, Kind, Split, State

AXIS = "self.context"


def not_runnable(*_: Any) -> NoReturn:
    raise InternalError("what context ranks share is emitted, never run inside the compiler")


def gather_tokens(*args: Any) -> Any:
    """x, dim, ranks: a rank's tokens -> those of all ranks, in the sequence's order."""
    not_runnable(args)


def own_tokens(*args: Any) -> Any:
    """x, dim, ranks: a value that all ranks hold -> this rank's tokens of it."""
    not_runnable(args)


def context_rotary(*args: Any) -> Any:
    """`rotary` of tokens that stand where this rank's stand: x, base."""
    not_runnable(args)


def context_positions(*args: Any) -> Any:
    """`positions`, this rank's rows of the table: ids, table."""
    not_runnable(args)


def context_dropout(*args: Any) -> Any:
    """`dropout` of this rank's tokens along `dim`: x, samples, p, operator, dim, ranks."""
    not_runnable(args)


def context_masked_softmax(*args: Any) -> Any:
    """`masked_softmax` for this rank's queries: x, causal, window."""
    not_runnable(args)


# --------------------------------------------------------------------------------------------------
# Forms


def _form(original: Callable[..., Any]) -> Callable[[MakeForm], MakeForm]:
    def add(make: MakeForm) -> MakeForm:
        CONTEXT_FORMS[original] = make
        return make

    return add


@_form(rotary)
def _rotary(node: fx.Node, have: tuple[State, ...], ranks: int, style: str) -> ContextForm | None:
    if have != (Split(1),):
        return None
    return ContextForm(function=context_rotary, arguments=(), operands=have, result=Split(1))


@_form(positions)
def _positions(
    node: fx.Node, have: tuple[State, ...], ranks: int, style: str
) -> ContextForm | None:
    if have != (Split(1), SHADOW):
        return None
    return ContextForm(function=context_positions, arguments=(), operands=have, result=Split(0))


@_form(dropout)
def _dropout(node: fx.Node, have: tuple[State, ...], ranks: int, style: str) -> ContextForm | None:
    where = have[0]
    if where.kind is not Kind.SPLIT or not where.dim or have[1] != WHOLE:
        return None
    return ContextForm(
        function=context_dropout, arguments=(where.dim, ranks), operands=have, result=where
    )


@_form(masked_softmax)
def _masked_softmax(
    node: fx.Node, have: tuple[State, ...], ranks: int, style: str
) -> ContextForm | None:
    if have != (Split(2),):
        return None
    return ContextForm(
        function=context_masked_softmax, arguments=(), operands=have, result=Split(2)
    )


# --------------------------------------------------------------------------------------------------
# Entries


def _move_rule(node: fx.Node) -> Rule:
    """Any other dimension may be split over tensor ranks; sequences are the data axes' own."""
    shape, dim = shape_of(node), node.args[1]
    names = [f"d{i}" for i in range(len(shape))]
    dims = tuple((n,) for n in names)
    moved: tuple[tuple[str, ...], ...] = tuple(
        ("all",) if i == dim else (n,) for i, n in enumerate(names)
    )
    sizes = dict(zip(names, shape, strict=True))
    sizes["all"] = shape_of(node.args[0])[dim]  # type: ignore[arg-type,index]
    return Rule(
        operands=(moved,),
        result=dims,
        sizes=sizes,
        whole=frozenset({"all", f"d{dim}"} | ({"d0"} if len(shape) > 1 else set())),
        linear=((0,),),
    )


def _gather_sends(node: fx.Node, shapes: Shapes) -> tuple[Sends, ...]:
    whole = numel(shapes.result)
    if without_gradient(node):
        return (
            Sends(
                axis="context",
                kind=Collective.ALL_GATHER,
                elements_forward=whole,
                elements_backward=0,
            ),
        )
    return (
        Sends(
            axis="context",
            kind=Collective.ALL_GATHER,
            elements_forward=whole,
            elements_backward=0,
        ),
        Sends(
            axis="context",
            kind=Collective.REDUCE_SCATTER,
            elements_forward=0,
            elements_backward=whole,
        ),
    )


def _register_move(
    function: Callable[..., Any],
    sends: Callable[[fx.Node, Shapes], tuple[Sends, ...]] | None,
) -> None:
    name = function.__name__

    def render(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
        return Printed(f"{name}({args[0]}, {args[1]}, {AXIS})", (("runtime.context", name),))

    register(
        Entry(
            name=name,
            function=function,
            rule=_move_rule,
            flops=lambda node, shapes: 0.0,
            saved=lambda node, shapes: Saved(),
            render=render,
            sends=sends,
        )
    )


_register_move(gather_tokens, _gather_sends)
_register_move(own_tokens, None)


def elsewhere(
    original: Callable[..., Any],
    function: Callable[..., Any],
    render: Callable[[fx.Node, Sequence[str], Localised], Printed],
    formula: Formula | None = None,
    sends: Callable[[fx.Node, Shapes], tuple[Sends, ...]] | None = None,
) -> None:
    """An operator that is another one at other places."""
    like = REGISTRY[original]
    register(
        Entry(
            name=function.__name__,
            function=function,
            rule=like.rule,
            flops=like.flops,
            saved=like.saved,
            render=render,
            moved=like.moved,
            formula=formula,
            sends=sends,
        )
    )


def _render_rotary(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    text = f"rotary({args[0]}, base={args[1]}, context={AXIS})"
    return Printed(text, (("runtime.rotary", "rotary"),))


Imports = tuple[tuple[str, str], ...]
NOTHING: Imports = ()
PLACES: Imports = (("runtime.context", "token_positions"),)


def _render_positions(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    tokens = shape_of(node.args[0])[1]  # type: ignore[arg-type]
    places = f"token_positions({AXIS}, {tokens}, {args[0]}.device)"
    return Printed(f"{args[1]}[{places}]", PLACES)


def _part(node: fx.Node, args: Sequence[str], local: Localised) -> dropouts.Part:
    x, dim, ranks = args[0], int(args[4]), int(args[5])
    whole = list(local.whole_result or shape_of(node))
    places = f"token_positions({AXIS}, {whole[dim]}, {x}.device)"
    starts = ["0"] * len(whole)
    if local.factor:
        along = int(local.factor[1:])
        starts[along] = f"{local.axis}.rank * {x}.shape[{along}]"
        if along == dim:
            places += f".chunk({local.axis}.size)[{local.axis}.rank]"
    starts[dim] = places
    whole[dim] *= ranks
    return dropouts.Part(tuple(starts[1:]), tuple(whole[1:]), PLACES)


def _render_dropout(node: fx.Node, args: Sequence[str], local: Localised) -> Printed:
    return dropouts.printed(node, args, _part(node, args, local))


def _render_softmax(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    x, (_b, _h, t, s) = args[0], shape_of(node)
    causal, window = node.args[1:]
    if not causal and window is None:
        masked, imports = x, NOTHING
    else:
        options = f"causal={causal}" + (f", window={window}" if window is not None else "")
        hidden = f"hidden_tokens({AXIS}, {t}, {s}, {x}.device, {options})"
        masked = f'{x}.masked_fill({hidden}, float("-inf"))'
        imports = (("runtime.context", "hidden_tokens"),)
    return Printed(f"{masked}.softmax(-1)", imports)


elsewhere(rotary, context_rotary, _render_rotary, turning(f", context={AXIS}"))
elsewhere(positions, context_positions, _render_positions)
elsewhere(dropout, context_dropout, _render_dropout, dropouts.formula(_part))
elsewhere(masked_softmax, context_masked_softmax, _render_softmax, softmax(f", context={AXIS}"))
