"""Attention of a rank's tokens to those of all context ranks, in three styles; see
`runtime/context_attention.py`.

ring     k and v go round; gather: every rank gathers them; ulysses: tokens change places with heads
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import fx

from llmspec.compiler.ops.attention import (
    attention,
    kernel_saved,
    repeated,
    square_flops,
    tiled,
    visible_share,
)
from llmspec.compiler.ops.context import AXIS, not_runnable
from llmspec.compiler.ops.registry import (
    CONTEXT_FORMS,
    ContextForm,
    Entry,
    Localised,
    Printed,
    Rule,
    Saved,
    Sends,
    Shapes,
    index_rule,
    numel,
    register,
    shape_of,
)
from llmspec.compiler.placement import Collective, Split, State
from llmspec.compiler.text import listed


def ring_attention(*args: Any) -> Any:
    """q, k, v, causal, window, explicit, ranks: as `attention`, on a rank's tokens."""
    not_runnable(args)


def gather_attention(*args: Any) -> Any:
    """The arguments of `ring_attention`."""
    not_runnable(args)


def ulysses_attention(*args: Any) -> Any:
    """The arguments of `ring_attention`."""
    not_runnable(args)


STYLES: dict[str, Callable[..., Any]] = {
    "ring": ring_attention,
    "ulysses": ulysses_attention,
    "gather": gather_attention,
}


def divides_heads(node: fx.Node, ranks: int) -> bool:
    """Whether `ranks` can share an attention's query heads."""
    return shape_of(node)[2] % ranks == 0


def _form(node: fx.Node, have: tuple[State, ...], ranks: int, style: str) -> ContextForm | None:
    """Queries and keys are the same tokens; others are gathered, as the rule says."""
    tokens = {shape_of(o)[1] for o in node.args[:3]}  # type: ignore[arg-type]
    if have != (Split(1),) * 3 or len(tokens) > 1:
        return None
    if style == "ulysses" and not divides_heads(node, ranks):
        return None
    return ContextForm(function=STYLES[style], arguments=(ranks,), operands=have, result=Split(1))


CONTEXT_FORMS[attention] = _form


def _ranks(node: fx.Node) -> int:
    return cast(int, node.args[6])


def _rule(node: fx.Node) -> Rule:
    """Tensor ranks share heads, as in `attention`."""
    (b, t, h, e), (_, s, k, _), _v = (shape_of(a) for a in node.args[:3])  # type: ignore[arg-type]
    sizes = {"b": b, "t": t, "s": s, "k": k, "g": h // k, "e": e}
    return index_rule(
        "b t (k g) e, b s k e, b s k e -> b t (k g) e",
        sizes,
        whole=frozenset("btse"),
        linear=((2,),),
    )


def _ulysses_rule(node: fx.Node) -> Rule:
    """What a tensor rank has of the query heads, context ranks must divide again."""
    (b, t, h, e), (_, s, kv, _), _v = (shape_of(a) for a in node.args[:3])  # type: ignore[arg-type]
    k = math.gcd(kv, h // _ranks(node))
    sizes = {"b": b, "t": t, "s": s, "k": k, "j": kv // k, "g": h // kv, "e": e}
    return index_rule(
        "b t (k j g) e, b s (k j) e, b s (k j) e -> b t (k j g) e",
        sizes,
        whole=frozenset("btse"),
        linear=((2,),),
    )


def _share(node: fx.Node, shapes: Shapes) -> float:
    tokens = shapes.operands[0][1] * _ranks(node)
    return visible_share(tokens, tokens, cast(bool, node.args[3]), cast(int | None, node.args[4]))


def _square_flops(node: fx.Node, shapes: Shapes) -> float:
    return square_flops(shapes) * _ranks(node)


def _flops(node: fx.Node, shapes: Shapes) -> float:
    """The order of tokens gives every rank the same share of a causal square. Written out, Ulysses
    computes all of it; the blocks of the others are skipped where nothing is seen."""
    whole = node.target is ulysses_attention and node.args[5]
    return _square_flops(node, shapes) * (1.0 if whole else _share(node, shapes))


def _backward_factor(node: fx.Node) -> float:
    """As of `attention`: where Ulysses writes it out, the scores are kept."""
    return 2.0 if node.target is ulysses_attention and node.args[5] else 2.5


def _model_flops(node: fx.Node, shapes: Shapes) -> float:
    return _square_flops(node, shapes) * _share(node, shapes)


def _blocks_saved(node: fx.Node, shapes: Shapes) -> Saved:
    return kernel_saved(shapes)


def _repeat(node: fx.Node, shapes: Shapes) -> int:
    """How often Ulysses repeats key/value heads so that the ranks divide them."""
    heads = shapes.operands[1][2]
    return math.lcm(heads, _ranks(node)) // heads


def _windowed(node: fx.Node, shapes: Shapes) -> bool:
    """Whether each rank's attention over all tokens goes through a mask."""
    window = cast(int | None, node.args[4])
    return window is not None and window < shapes.operands[1][1] * _ranks(node)


def _ulysses_saved(node: fx.Node, shapes: Shapes) -> Saved:
    """q, k, v and the result as they are after the exchange: other tensors than the operands; heads
    of another size than the widest are filled up with zeros (see `kernel_saved`)."""
    b, t, h, e = shapes.operands[0]
    widest = max(e, shapes.operands[2][-1])
    keys = _repeat(node, shapes) * (numel(shapes.operands[1]) + numel(shapes.operands[2]))
    queries = numel(shapes.operands[0])
    if not node.args[5]:
        heads, masks = _repeat(node, shapes) * shapes.operands[1][2], 0
        if _windowed(node, shapes):  # as `masked_saved`
            heads, masks = h, (t * _ranks(node)) ** 2
        kept = widest * b * t * (2 * h + 2 * heads) + masks
        return Saved(extra_elements=kept, extra_bytes=4 * b * t * h)
    square = b * h * t * t * _ranks(node)
    keys = sum(map(repeated(h), shapes.operands[1:]))
    return Saved(extra_elements=queries + keys + square)


def _keys_and_values(shapes: Shapes) -> int:
    """They travel as one, as wide as the wider."""
    return 2 * max(numel(shapes.operands[1]), numel(shapes.operands[2]))


def _ring_sends(node: fx.Node, shapes: Shapes) -> tuple[Sends, ...]:
    """k and v pass every other rank, forward and again backward; their gradients come home."""
    both, ranks = _keys_and_values(shapes), _ranks(node)
    values = Sends(
        axis="context",
        kind=Collective.SEND,
        elements_forward=both,
        elements_backward=both,
        count=ranks - 1,
        hidden=True,
        what="keys and values",
    )
    gradients = Sends(
        axis="context",
        kind=Collective.SEND,
        elements_forward=0,
        elements_backward=both,
        count=ranks,
        hidden=True,
        wide=True,
        what="their gradients",
    )
    return values, gradients


def _gather_sends(node: fx.Node, shapes: Shapes) -> tuple[Sends, ...]:
    both = _keys_and_values(shapes) * _ranks(node)
    values = Sends(
        axis="context",
        kind=Collective.ALL_GATHER,
        elements_forward=both,
        elements_backward=both,
        what="keys and values",
    )
    gradients = Sends(
        axis="context",
        kind=Collective.REDUCE_SCATTER,
        elements_forward=0,
        elements_backward=both,
        wide=True,
        what="their gradients",
    )
    return values, gradients


def _ulysses_sends(node: fx.Node, shapes: Shapes) -> tuple[Sends, ...]:
    """q and the result, k and v: once each, and their gradients back."""
    ranks = _ranks(node)
    q, k, v = (numel(shape) * ranks for shape in shapes.operands)
    repeat, out = _repeat(node, shapes), numel(shapes.result) * ranks
    sizes = {"queries": q, "keys": repeat * k, "values": repeat * v, "results": out}
    alike: dict[int, list[str]] = {}
    for name, elements in sizes.items():
        alike.setdefault(elements, []).append(name)
    return tuple(
        Sends(
            axis="context",
            kind=Collective.ALL_TO_ALL,
            elements_forward=elements,
            elements_backward=elements,
            count=len(names),
            what=listed(names),
        )
        for elements, names in alike.items()
    )


def _ring_buffers(node: fx.Node, shapes: Shapes, width: int) -> int:
    """k and v, the own, the ones at hand and the next; three pairs of their gradients and q's, in
    float32 at least. A block is half of the pair."""
    queries, pair = numel(shapes.operands[0]), _keys_and_values(shapes)
    values = min(3, _ranks(node)) * pair - pair // 2
    return width * values + max(width, 4) * (3 * pair + queries)


def _gather_buffers(node: fx.Node, shapes: Shapes, width: int) -> int:
    """The own k and v and all ranks', the gradients of one and of all, and q's."""
    queries, pair = numel(shapes.operands[0]), _keys_and_values(shapes)
    every = (_ranks(node) + 1) * pair
    return width * (every - pair // 2) + max(width, 4) * (every + queries)


def _exchanged(node: fx.Node, shapes: Shapes, width: int) -> int:
    """The result in pieces on its way back, which are put together twice."""
    return width * numel(shapes.result)


def _render(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    name = node.target.__name__  # type: ignore[union-attr]
    causal, window, explicit = node.args[3:6]
    options = f"causal={causal}"
    options += f", window={window}" if window is not None else ""
    options += ", explicit=True" if explicit else ""
    text = f"{name}({', '.join(args[:3])}, {AXIS}, {options})"
    return Printed(text, (("runtime.context_attention", name),))


for _function, _placed, _saved, _sends, _buffers in (
    (ring_attention, _rule, _blocks_saved, _ring_sends, _ring_buffers),
    (gather_attention, _rule, _blocks_saved, _gather_sends, _gather_buffers),
    (ulysses_attention, _ulysses_rule, _ulysses_saved, _ulysses_sends, None),
):
    register(
        Entry(
            name=_function.__name__,
            function=_function,
            rule=_placed,
            flops=_flops,
            saved=_saved,
            render=_render,
            contraction=True,
            tiled=lambda node, shapes: tiled(shapes, _flops(node, shapes)),
            backward_factor=_backward_factor,
            model_flops=_model_flops,
            sends=_sends,
            buffers=_buffers,
            forward_buffers=_exchanged if _function is ulysses_attention else None,
        )
    )
