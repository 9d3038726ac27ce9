"""Attention in its three steps, for models that do something to its weights (dropout)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx

from llmspec.compiler.ops.attention import mask, repeated
from llmspec.compiler.ops.formula import Expr, Extra, Formula, Given, Maker, Seen
from llmspec.compiler.ops.registry import (
    Entry,
    Localised,
    Printed,
    Rule,
    Saved,
    Shapes,
    index_rule,
    numel,
    register,
    shape_of,
)


def scores(q: Tensor, k: Tensor) -> Tensor:
    """q [B, T, H, E], k [B, S, K, E] with K dividing H -> q kᵀ / sqrt(E) [B, H, T, S]."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * q.shape[-1] ** -0.5


def masked_softmax(x: Tensor, causal: bool, window: int | None) -> Tensor:
    """x [B, H, T, S] -> weights over the keys that each token may see; float32 inside at least, as
    PyTorch's kernels are."""
    seen = mask(x.shape[2], x.shape[3], causal, window, x.device)
    return x.masked_fill(~seen, float("-inf")).softmax(-1)


def mixture(weights: Tensor, v: Tensor) -> Tensor:
    """weights [B, H, T, S], v [B, S, K, E] -> [B, T, H, E]."""
    v = v.repeat_interleave(weights.shape[1] // v.shape[2], 2)
    return (weights @ v.transpose(1, 2)).transpose(1, 2)


def _sizes(node: fx.Node, b: int, t: int, s: int, h: int, kv: fx.Node) -> dict[str, int]:
    k, e = shape_of(kv)[2:]
    return {"b": b, "t": t, "s": s, "k": k, "g": h // k, "e": e}


def _scores_rule(node: fx.Node) -> Rule:
    b, h, t, s = shape_of(node)
    return index_rule(
        "b t (k g) e, b s k e -> b (k g) t s",
        _sizes(node, b, t, s, h, node.args[1]),  # type: ignore[arg-type]
        whole=frozenset("bse"),
        linear=((0,), (1,)),
    )


def _mixture_rule(node: fx.Node) -> Rule:
    b, h, t, s = shape_of(node.args[0])  # type: ignore[arg-type]
    return index_rule(
        "b (k g) t s, b s k e -> b t (k g) e",
        _sizes(node, b, t, s, h, node.args[1]),  # type: ignore[arg-type]
        whole=frozenset("bse"),
        linear=((0,), (1,)),
    )


def _softmax_rule(node: fx.Node) -> Rule:
    b, h, t, s = shape_of(node)
    sizes = {"b": b, "h": h, "t": t, "s": s}
    return index_rule("b h t s -> b h t s", sizes, whole=frozenset("bts"))


def _grouped(name: str, node: fx.Node, heads: int) -> str:
    groups = heads // shape_of(node)[2]
    return f"{name}.repeat_interleave({groups}, 2)" if groups > 1 else name


def _render_scores(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    q, k = node.args
    heads, size = shape_of(q)[2:]  # type: ignore[arg-type]
    keys = _grouped(args[1], k, heads)  # type: ignore[arg-type]
    return Printed(f"{args[0]}.transpose(1, 2) @ {keys}.permute(0, 2, 3, 1) * {size**-0.5!r}")


def _render_softmax(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    causal, window = node.args[1:]
    options = f", causal={causal}" + (f", window={window}" if window is not None else "")
    return Printed(
        f"masked_softmax({args[0]}{options})", (("runtime.attention", "masked_softmax"),)
    )


def softmax(given: str = "") -> Formula:
    """Softmax over the keys that a query sees. given: what the call says of the queries' places."""

    def masked(node: fx.Node) -> bool:
        _, causal, window = node.args
        return bool(causal) or window is not None

    def value(node: fx.Node, m: Maker, x: Sequence[Expr]) -> Expr:
        scores = x[0]
        if masked(node):
            causal, window = node.args[1:]
            assert window is None or isinstance(window, int), "in tokens"
            kind: Seen = (bool(causal), window)
            scores = m.make("seen", (x[0], x[-1]), kind, rows=True, columns=True).named("seen")
        above = m.apply("exp", scores - m.row_max(scores).named("top")).named("above")
        return above / m.row_sum(above).named("total")

    def gradient(
        node: fx.Node, m: Maker, x: Sequence[Expr], y: Expr, g: Expr
    ) -> Sequence[Expr | None]:
        # what is hidden has a weight of 0, and so a gradient of 0
        return (y * (g - m.row_sum(g * y).named("along")),)

    queries = Extra(name="queries", per=(2, 3), columns=False, integer=True)

    def places(node: fx.Node, args: Sequence[str], _: Localised) -> Given:
        if not masked(node):
            return Given()
        text = f"query_places({args[0]}{given})"
        return Given((text,), (("runtime.context", "query_places"),))

    return Formula(
        value=value,
        gradient=gradient,
        extras=lambda node: (queries,) if masked(node) else (),
        given=places,
    )


def _render_mixture(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    weights, v = node.args
    values = _grouped(args[1], v, shape_of(weights)[1])  # type: ignore[arg-type]
    return Printed(f"({args[0]} @ {values}.transpose(1, 2)).transpose(1, 2)")


def _product_flops(node: fx.Node, shapes: Shapes) -> float:
    square = shapes.result if node.target is scores else shapes.operands[0]
    return 2.0 * numel(square) * shapes.operands[1][-1]


def _softmax_moved(
    node: fx.Node, shapes: Shapes, width: int, fused: frozenset[str]
) -> tuple[float, float]:
    """A mask and a softmax, or one kernel for both."""
    square = width * numel(shapes.result)
    hides = (node.args[1] or node.args[2] is not None) and "softmax" not in fused
    return (4.0 if hides else 2.0) * square, (5.0 if hides else 3.0) * square


def _product_saved(node: fx.Node, shapes: Shapes) -> Saved:
    heads = shapes.operands[0][2 if node.target is scores else 1]
    if heads == shapes.operands[1][2]:
        return Saved(operands=(0, 1))
    return Saved(operands=(0,), extra_elements=repeated(heads)(shapes.operands[1]))


for _function, _rule, _render in (
    (scores, _scores_rule, _render_scores),
    (mixture, _mixture_rule, _render_mixture),
):
    register(
        Entry(
            name=_function.__name__,
            function=_function,
            rule=_rule,
            flops=_product_flops,
            saved=_product_saved,
            render=_render,
            contraction=True,
        )
    )

register(
    Entry(
        name="masked_softmax",
        function=masked_softmax,
        rule=_softmax_rule,
        flops=lambda node, shapes: 6.0 * numel(shapes.result),
        saved=lambda node, shapes: Saved(result=True),
        moved=_softmax_moved,
        render=_render_softmax,
        formula=softmax(),
    )
)
