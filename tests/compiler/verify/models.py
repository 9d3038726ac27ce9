"""Specs for verification: models of real size, split as the search would split them for good."""

from __future__ import annotations

from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.driver import Session
from llmspec.compiler.plan import Plan
from llmspec.compiler.search.search import Found

LLAMA = """
import llama
model m = llama(layers=8, width=4096, heads=32, kv_heads=8, ffn=14336, vocab=128_256, context=512)
"""

GPT = """
model m {
    vocab = 50257; context = 512; width = 4096
    block layer(x) {
        x = x + dropout(attention(layernorm(x), heads=32, causal, bias), 0.1)
        x = x + dropout(mlp(layernorm(x), ffn=4 * width, activation=gelu, bias), 0.1)
    }
    tokens -> embed(positions=learned) -> dropout(0.1) -> layer * 8 -> layernorm -> unembed(tied)
}
"""

# masks on the weights of attention, which is written out then
DROPPED = GPT.replace("causal, bias)", "causal, bias, dropout=0.1)")

MODELS = {"llama": LLAMA, "gpt": GPT}


def spec_text(model: str, devices: int, batch: int, pins: str, precision: str = "fp32") -> str:
    return f"""{model}
cluster c {{ node = {devices} * gpu("H200") }}
train t {{
    model = m; cluster = c; dataset = synthetic(); steps = 10
    batch = {batch} sequences; precision = {precision}
}}
plan {{ {pins} }}
"""


def planned(text: str) -> tuple[Session, Plan]:
    """The session of a spec, and the plan that the search finds under its pins."""
    session = Session(dsl.load("test.llmspec", text=text))
    found = driver.find_plan(session)
    assert isinstance(found, Found), f"no plan fits: {found}"
    return session, found.plan
