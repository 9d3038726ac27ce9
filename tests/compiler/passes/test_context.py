"""What a context rank's graph is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import fx

from llmspec.compiler.build.builder import UnitBuilder
from llmspec.compiler.build.model import build_model
from llmspec.compiler.graph import Init, Instance, ModelGraph, Unit
from llmspec.compiler.ops import elementwise, weights
from llmspec.compiler.ops.attention import attention, rotary
from llmspec.compiler.ops.context import (
    context_dropout,
    context_masked_softmax,
    context_positions,
    context_rotary,
    gather_tokens,
    own_tokens,
)
from llmspec.compiler.ops.context_attention import (
    gather_attention,
    ring_attention,
    ulysses_attention,
)
from llmspec.compiler.ops.dropout import dropout
from llmspec.compiler.ops.embedding import positions
from llmspec.compiler.ops.linear import linear
from llmspec.compiler.ops.opaque import Call, Slot, opaque
from llmspec.compiler.ops.registry import choices, entry_of
from llmspec.compiler.passes.context import possible_styles, split_context
from tests.compiler.specs import gpt

B, T, H, K, E, RANKS = 2, 16, 4, 2, 8, 2


def split(
    build: Callable[[UnitBuilder], fx.Node], ranks: int = RANKS, style: str = "gather"
) -> Unit:
    """The unit of one context rank."""
    b = UnitBuilder("unit")
    unit = b.finish(build(b))
    graph = ModelGraph(
        name="m",
        units={"unit": unit},
        instances=(Instance(unit="unit", prefix=""),),
        sequences=B,
        tokens=T,
        vocab=7,
        dropout=False,
    )
    local = split_context(graph, ranks, style)
    assert local.tokens == T // ranks
    return local.units["unit"]


def targets(unit: Unit) -> list[Any]:
    return [n.target for n in unit.calls()]


def heads(b: UnitBuilder) -> tuple[fx.Node, fx.Node]:
    return b.input("q", (B, T, H, E), "BTHE"), b.input("k", (B, T, K, E), "BTKE")


def attend(b: UnitBuilder, **how: Any) -> fx.Node:
    q, k = heads(b)
    q = b.call(rotary, q, 10.0, label="q", dims="BTHE")
    return b.call(attention, q, k, k, True, None, False, label="mixed", dims="BTHE")


@pytest.mark.parametrize(
    ("style", "function"),
    [("ring", ring_attention), ("gather", gather_attention), ("ulysses", ulysses_attention)],
)
def test_attention_in_each_style(style: str, function: Callable[..., Any]) -> None:
    unit = split(attend, style=style)
    assert targets(unit) == [context_rotary, function]
    assert unit.result().meta["shape"] == (B, T // RANKS, H, E)
    assert unit.result().args[-1] == RANKS


def test_written_out_attention_gathers_keys_alone() -> None:
    def build(b: UnitBuilder) -> fx.Node:
        q, k = heads(b)
        samples = b.input("samples", (B,), "B")
        square = b.call(weights.scores, q, k, label="scores", dims="BHTS")
        seen = b.call(weights.masked_softmax, square, True, None, label="weights", dims="BHTS")
        kept = b.call(dropout, seen, samples, 0.5, 0, label="kept", dims="BHTS")
        return b.call(weights.mixture, kept, k, label="mixed", dims="BTHE")

    unit = split(build)
    gathered, square, seen, kept, mixed = unit.calls()
    assert (gathered.target, gathered.meta["shape"]) == (gather_tokens, (B, T, K, E))
    assert gathered.meta["dims"] == "BWKE"
    assert (square.target, square.meta["shape"]) == (weights.scores, (B, H, T // RANKS, T))
    assert seen.target is context_masked_softmax
    assert (kept.target, kept.args[-2:]) == (context_dropout, (2, RANKS))
    assert mixed.meta["shape"] == (B, T // RANKS, H, E)


def test_what_nobody_thought_of_runs_whole() -> None:
    """An operator of PyTorch between two that run on slices."""

    def build(b: UnitBuilder) -> fx.Node:
        x = b.input("x", (B, T, E), "BTD")
        weight = b.parameter("w", (E, E), "FD", Init("constant"))
        y = b.call(linear, x, weight, label="y", dims="BTF")
        flip = Call(target="flip.default", args=(Slot(0), (1,)))
        y = b.call(opaque, y, flip, label="y", dims="BTF")
        return b.call(elementwise.gelu, y, label="y", dims="BTF")

    unit = split(build)
    assert targets(unit) == [linear, gather_tokens, opaque, own_tokens, elementwise.gelu]
    shapes = [n.meta["shape"][1] for n in unit.calls()]
    assert shapes == [T // RANKS, T, T, T // RANKS, T // RANKS]


def test_a_learned_table_is_cut() -> None:
    def build(b: UnitBuilder) -> fx.Node:
        ids = b.input("tokens", (B, T), "BT")
        x = b.input("x", (B, T, E), "BTD")
        table = b.parameter("table", (2 * T, E), "CD", Init("constant"))
        rows = b.call(positions, ids, table, label="rows", dims="TD")
        x = b.call(elementwise.add, x, rows, label="x", dims="BTD")
        scale = b.parameter("scale", (T, E), "TD", Init("constant"))
        return b.call(elementwise.multiply, x, scale, label="x", dims="BTD")

    unit = split(build)
    assert targets(unit) == [context_positions, elementwise.add, own_tokens, elementwise.multiply]


def test_a_loss_that_every_rank_has() -> None:
    """Parts of the loss are added up, so each rank gives its share."""

    def build(b: UnitBuilder) -> fx.Node:
        x = b.input("x", (B, T, E), "BTD")
        total = Call(target="sum.default", args=(Slot(0),))
        return b.call(opaque, x, total, label="loss", dims="")

    unit = split(build)
    assert targets(unit) == [gather_tokens, opaque, elementwise.divide]
    assert unit.result().args[1] == RANKS


def test_other_keys_than_queries_are_gathered() -> None:
    def build(b: UnitBuilder) -> fx.Node:
        q = b.input("q", (B, T, H, E), "BTHE")
        k = b.parameter("k", (B, 2 * T, K, E), "BSKE", Init("constant"))
        return b.call(attention, q, k, k, False, None, False, label="mixed", dims="BTHE")

    unit = split(build)
    assert targets(unit) == [gather_tokens, attention, own_tokens]


def test_styles_that_are_possible() -> None:
    model = gpt(layers=2, width=64, heads=4, vocab=512, context=48)
    graph = build_model(model, sequences=1, tokens=48)
    assert possible_styles(graph, 2) == ("ring", "ulysses", "gather")
    assert possible_styles(graph, 3) == ("ring", "gather"), "3 ranks do not divide 4 heads"
    assert possible_styles(graph, 5) == (), "48 tokens are no 10 chunks"


def test_ulysses_leaves_heads_for_every_context_rank() -> None:
    """4 query and 2 key/value heads on 2 context ranks: 2 tensor ranks at most."""

    def legal(ranks: int, context: int) -> bool:
        node = split(attend, ranks=context, style="ulysses").result()
        return any(c.name == "split k" for c in choices(entry_of(node).rule(node), ranks))

    assert legal(2, 2)
    assert not legal(2, 4), "one head would be left for two context ranks"
