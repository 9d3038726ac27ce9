"""The last product and the loss as one operator: the same meaning, and where there is none."""

from __future__ import annotations

import torch

from llmspec import dsl
from llmspec.compiler.build.model import build_model
from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.ops.linear_loss import FEWEST_ROWS, linear_cross_entropy, rows_at_once
from llmspec.compiler.passes.loss import join_loss, joined_weight
from llmspec.compiler.reference import Reference

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
