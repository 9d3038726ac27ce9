"""Tables read by position: token embeddings, learned positions."""

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
    index_rule,
    letters,
    register,
    shape_of,
)


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """ids […] of integers, table [V, D] -> […, D]."""
    return F.embedding(ids, table)


def positions(ids: Tensor, table: Tensor) -> Tensor:
    """ids [B, T], table [C, D] -> the first T rows [T, D]."""
    return table[: ids.shape[1]]


def _embedding_rule(node: fx.Node) -> Rule:
    ids, table = (shape_of(a) for a in node.args)  # type: ignore[arg-type]
    lead = letters(len(ids), skip="vd")
    dims = " ".join(lead)
    return index_rule(
        f"{dims}, v d -> {dims} d",
        dict(zip(lead, ids, strict=True)) | {"v": table[0], "d": table[1]},
        whole=frozenset(lead[:1]),
        uneven=frozenset("v"),
        linear=((1,),),
        integer=frozenset({0}),
    )


def _render_embedding(node: fx.Node, args: Sequence[str], local: Localised) -> Printed:
    if local.factor != "v":
        return Printed(f"F.embedding({args[0]}, {args[1]})")
    vocabulary = local.whole_operands[1][0]
    split = f"whole_vocab={vocabulary}, axis={local.axis}"
    text = f"vocabulary_parallel_embedding({args[0]}, {args[1]}, {split})"
    return Printed(text, (("runtime.loss", "vocabulary_parallel_embedding"),))


register(
    Entry(
        name="embedding",
        function=embedding,
        rule=_embedding_rule,
        flops=lambda node, shapes: 0.0,
        saved=lambda node, shapes: Saved(),
        looks_up=True,
        render=_render_embedding,
    )
)


def _positions_rule(node: fx.Node) -> Rule:
    ids, table = (shape_of(a) for a in node.args)  # type: ignore[arg-type]
    return index_rule(
        "b t, c d -> t d",
        {"b": ids[0], "t": ids[1], "c": table[0], "d": table[1]},
        whole=frozenset("btc"),
        linear=((1,),),
        integer=frozenset({0}),
    )


register(
    Entry(
        name="positions",
        function=positions,
        rule=_positions_rule,
        flops=lambda node, shapes: 0.0,
        saved=lambda node, shapes: Saved(),
        looks_up=True,
        render=lambda node, args, local: Printed(f"{args[1]}[: {args[0]}.shape[1]]"),
    )
)
