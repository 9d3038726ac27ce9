"""The last product and the loss as one operator: the same meaning, and where there is none."""

from __future__ import annotations

import torch

from llmspec import dsl
from llmspec.compiler.build.model import build_model
from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.ops.linear_loss import FEWEST_ROWS, linear_cross_entropy, rows_at_once
from llmspec.compiler.passes.loss import join_loss, joined_weight
from llmspec.compiler.reference import Reference
from llmspec.compiler.search.meshes import Grid
from llmspec.compiler.search.space import Space
from llmspec.compiler.views import View

MODEL = """
model m {{
    vocab = 24; context = 8; width = 8
    tokens -> embed -> rmsnorm -> {unembed}
}}
cluster c {{ node = 1 * cpu }}
train {{ model = m; cluster = c; dataset = synthetic; batch = 2 sequences; steps = 1 }}
"""


def graph(unembed: str) -> ModelGraph:
    model = dsl.load("t.llmspec", text=MODEL.format(unembed=unembed)).model
    return build_model(model, sequences=2, tokens=8)


def test_the_joined_graph_means_the_same() -> None:
    for unembed in ("unembed", "unembed(tied)"):
        whole = graph(unembed)
        joined = join_loss(whole, rows=5)
        assert [n.target for n in joined.units["last"].calls()].count(linear_cross_entropy) == 1
        assert len(joined.units["last"].calls()) == len(whole.units["last"].calls()) - 1
        torch.manual_seed(0)
        weights = {n: torch.randn(p.shape, dtype=torch.float64) for n, p in whole.parameters()}
        tokens = torch.randint(0, 24, (2, 9))
        batch = (tokens[:, :-1], tokens[:, 1:], torch.arange(2))
        wanted = Reference(whole, weights).loss(*batch)
        torch.testing.assert_close(Reference(joined, weights).loss(*batch), wanted)


def test_what_stands_between_product_and_loss_keeps_them_apart() -> None:
    assert joined_weight(graph("unembed(bias)")) is None
    assert joined_weight(graph("unembed")) is not None


def test_rows_of_a_chunk() -> None:
    """256 MiB of logits, but enough rows for the product that adds to the weight's gradient."""
    assert rows_at_once(32_768, 2) == 4096
    assert rows_at_once(50_257, 2) == 2560
    assert rows_at_once(128_256, 2) == FEWEST_ROWS
    assert rows_at_once(128_256 // 8, 2) == 8320


def test_whole_logits_are_looked_at_where_they_may_keep_less() -> None:
    """A pipeline's micro-batch of fewer tokens than the model is wide."""
    text = MODEL.format(unembed="unembed").replace("node = 1", "node = 2")
    program = dsl.load("t.llmspec", text=text.replace("context = 8", "context = 4"))
    space = Space.of(program, lambda b: build_model(program.model, sequences=b, tokens=4))
    joined = View(loss_rows=space.ranges.loss_rows(1))
    assert joined.loss_rows == rows_at_once(24, 4)
    for pipeline, sequences, both in ((2, 1, True), (2, 2, False), (1, 1, False)):
        grid = Grid(tensor=1, pipeline=pipeline, data=1)
        found = space.ranges.with_logits(joined, grid, sequences)
        assert found == [joined, View()] if both else [joined]
