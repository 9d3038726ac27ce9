"""Rates of kernels against what others measured: the charts and tables that each constant names."""

from dataclasses import replace

import pytest

from llmspec import dsl
from llmspec.compiler.build.model import build_model
from llmspec.compiler.cost.compute import operator_cost, product_s, tiled_s
from llmspec.compiler.cost.data import data_cost
from llmspec.compiler.cost.hardware import GPU_CONSTANTS, machine_of
from llmspec.compiler.cost.types import Types
from llmspec.compiler.ops.registry import Shapes, Tiled, shapes_of
from llmspec.dsl.hardware import cluster_from_words
from tests.compiler.cost.test_data import groups, stage

BF16 = Types(matrix="bf16", compute=2)
ALONE = GPU_CONSTANTS["sustained"]
GPT = """
model m {
    vocab = 512; context = 64; width = 64
    block layer(x) {
        x = x + attention(layernorm(x), heads=4, bias, causal)
        x = x + mlp(layernorm(x), ffn=256, activation=gelu, bias)
    }
    tokens -> embed(positions=learned) -> layer * 2 -> layernorm -> unembed(tied)
}
cluster c { node = 8 * gpu("a100-80-sxm4") }
train { model = m; cluster = c; dataset = synthetic; batch = 8 sequences; steps = 1 }
"""


def machine(gpu: str):
    return machine_of(cluster_from_words(gpu), BF16)


def calls(text: str, sequences: int, tokens: int):
    model = dsl.load("t.llmspec", text=text).model
    graph = build_model(model, sequences=sequences, tokens=tokens)
    return [node for unit in graph.units.values() for node in unit.calls()]


@pytest.mark.parametrize(
    ("tokens", "measured"), [(512, 99), (1024, 133), (2048, 155), (4096, 173), (16384, 189)]
)
def test_fused_attention_follows_its_chart(tokens, measured):
    """FlashAttention-2 on A100: causal, heads of 128, width 2048, 16k tokens; TFLOP/s."""
    tiled = Tiled(blocks=16 * 16384 / 128, depth=tokens / 2)
    seconds = tiled_s(1e12, tiled, machine("a100-80-sxm4")) * ALONE
    assert 1 / seconds == pytest.approx(measured, rel=0.09)


@pytest.mark.parametrize(
    ("experts", "rows", "columns", "depth", "measured"),
    [
        (160, 154, 3072, 5120, 449),
        (256, 128, 4096, 7168, 468),
        (128, 256, 4096, 7168, 611),
        (40, 616, 3072, 5120, 1039),
        (32, 1024, 4096, 7168, 1031),
    ],
)
def test_grouped_products_follow_their_table(experts, rows, columns, depth, measured):
    """SimuMax's grouped products on B200, forward; TFLOP/s."""
    text = f"""
    model m {{
        vocab = 512; context = {rows * experts}; width = {depth}
        block layer(x) {{ x = x + moe(x, experts={experts}, top_k=1, expert=mlp(ffn={columns})) }}
        tokens -> embed -> layer * 1 -> rmsnorm -> unembed
    }}
    cluster c {{ node = 1 * gpu("b200-180-sxm") }}
    train {{ model = m; cluster = c; dataset = synthetic; batch = 1 sequences; steps = 1 }}
    """
    node = next(n for n in calls(text, 1, rows * experts) if n.target.__name__ == "grouped_linear")
    cost = operator_cost(node, shapes_of(node), machine("b200-180-sxm"), 2)
    assert cost.flops / cost.forward_s / ALONE / 1e12 == pytest.approx(measured, rel=0.35)


def test_rows_that_are_no_multiple_of_sixteen_bytes_halve_the_rate():
    def spent(columns: int) -> float:
        shapes = Shapes(((8192, 768), (columns, 768)), (8192, columns))
        return product_s(2 * 8192 * 768 * columns, shapes, machine("a100-80-sxm4"), 2)

    assert spent(50257) == pytest.approx(2 * spent(50304), rel=0.01)
    assert spent(50264) == pytest.approx(spent(50304), rel=0.01)


def test_a_bias_joins_its_product():
    adds = [n for n in calls(GPT, 8, 64) if n.target.__name__ == "add"]
    costs = [operator_cost(n, shapes_of(n), machine("a100-80-sxm4"), 2) for n in adds]
    biases = [c for n, c in zip(adds, costs, strict=True) if n.args[1].op == "get_attr"]
    assert len(biases) >= 6 and all(c.forward_s == 0 < c.backward_s for c in biases)
    assert any(c.forward_s > 0 for c in costs)


@pytest.mark.parametrize(
    ("zero", "forward", "backward"),
    [
        (0, 6, 6 + 0.75 * 12),  # cast; cast back, and three of four micro-batches added up
        (1, 0, 2 + 4 + 0.75 * 4),
        (2, 0, 2 + 4),
        (3, 0, 2 + 4),
    ],
)
def test_what_micro_batches_do_with_weights(zero, forward, backward):
    """Bytes an element, of four micro-batches in bf16 with float32 masters."""
    rate = machine("a100-80-sxm4")
    one = stage(0.0)
    cost = data_cost(one, zero, 4, groups(1, 8), BF16, rate)
    per_element = rate.memory_bytes_per_s / one.elements
    assert cost.weights_forward_s * per_element == pytest.approx(forward)
    assert cost.weights_backward_s * per_element == pytest.approx(backward)
    own = replace(rate, gradient_bytes=6.0)
    assert data_cost(one, zero, 4, groups(1, 8), BF16, own).weights_forward_s == 0
