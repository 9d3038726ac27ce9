"""Specs that several tests read, and ways to compare programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from llmspec.dsl import load
from llmspec.dsl.program import Program, Span

ROOT = Path(__file__).resolve().parents[2]

MODEL = """model tiny {
    vocab = 256; context = 128; width = 64
    block layer(x) {
        x = x + attention(rmsnorm(x), heads=8, kv_heads=4, causal)
        x = x + mlp(rmsnorm(x), ffn=256)
    }
    tokens -> embed -> layer * 4 -> rmsnorm -> unembed
}
"""
CLUSTER = 'cluster pod { node = 8 * gpu("H100") }\n'
TRAIN = (
    "train { model = tiny; cluster = pod; dataset = synthetic; batch = 64 sequences; steps = 10 }\n"
)
SPEC = MODEL + CLUSTER + TRAIN

MIXED = (
    """model tiny {
    vocab = 100; context = 64; width = 32; layers = 4
    block near(x) {
        let f = mlp(ffn=64)
        h = layernorm(x) -> linear(3 * width) -> gelu -> linear(bias)
        x = x + f(h) * 0.5 + f(x)
        x = x - 2 * attention(rmsnorm(x), heads=4, kv_heads=2, causal, window=16)
    }
    block far(x, size=2) {
        x = x + near(x)
        y = rmsnorm(x) * -1
        x = x + y + mlp(y, ffn=size * width)
    }
    block cross(x, src) { x = x + attention(x, over=src, heads=2) }
    let shared = swiglu(ffn=7)
    let table = embed
    let start = tokens -> table
    let more = start + shared(start) * 2
    start + more -> shared -> (near -> far(size=3)) * layers -> far -> cross(src=more) * 2
          -> rmsnorm -> rmsnorm -> unembed(tied=table)
}
"""
    + CLUSTER
    + TRAIN
    + "plan { tensor <= 2; zero in [1, 3]; schedule = 1f1b; stages = [5, 6]; pipeline = 2\n"
    + "       sequence = on; recompute = none; microbatch = auto }\n"
)


def whole_specs() -> dict[str, str]:
    """Valid specs by name, and the examples of the repository that name no other files."""
    found = {"spec": SPEC, "mixed": MIXED}
    for path in sorted((ROOT / "examples").glob("*.llmspec")):
        text = path.read_text(encoding="utf-8")
        if "python(" not in text and "huggingface(" not in text and ".json" not in text:
            found[path.name] = text
    return found


def meaning(value: object) -> object:
    """The value without the places it came from."""
    skipped = ("span", "path", "folder", "source_hash", "key_spans", "nodes_span")
    if isinstance(value, Span):
        return None
    if isinstance(value, dict):
        return {k: meaning(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(map(meaning, value))
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if f.name not in skipped]
        return (type(value).__name__, *((name, meaning(getattr(value, name))) for name in fields))
    return value


def program(text: str, train: str | None = None) -> Program:
    return load("spec.llmspec", text=text, train=train)
