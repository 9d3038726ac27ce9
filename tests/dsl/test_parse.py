from __future__ import annotations

import time

import pytest

from llmspec.dsl import syntax
from llmspec.dsl.parse import MAX_BYTES, parse, parser

LANGUAGE = """
import llama
import "parts/blocks.llmspec"
model big(layers, ffn=4 * 512,) {
    block reader(x)   { x = x + attention(rmsnorm(x), heads=12); x = x + mlp(x, activation=relu) }
    block writer(x, src) {
        x = x + attention(rmsnorm(x), over=src, heads=12)
        x = x + moe(rmsnorm(x), experts=8, top_k=2, expert=swiglu(ffn=14336))
    }
    let table = embed
    let read  = source -> table -> reader * 12 -> rmsnorm
    target -> table -> (writer(src=read) -> reader) * 12
           -> rmsnorm -> unembed(tied=table)
}
model qwen = huggingface("config.json")
cluster pod { node = 8 * gpu("H100-SXM"); nodes <= 128; network = 400 Gb/s per gpu }
cluster laptop { node = 2 * cpu }
train pretrain {
    model = big; cluster = pod
    tokens = 1.4T
    batch = 4Mi tokens
    optimizer = galore(adamw8bit(lr=1e-3), rank=1024, every=200)
    learning_rate = warmup(2000) then constant(10)
        then cosine(to=3e-5)
    precision in [bf16, fp8]
    adapt = lora(rank=16, alpha=32, on=[attention, mlp])
}
budget { memory = 72 GiB per gpu; deadline = 30 days }
plan fast { tensor <= 8; stages = [8, 8]; zero in [1, 3]; schedule = 1f1b; recompute = auto }
prefer fewest gpus
gpu "H100-SXM" {
    memory    = 80 GiB at 3.35 TB/s
    peak      = { bf16: 989 TFLOP/s, fp8: 1979 TFLOP/s,
                  fp32: 67 TFLOP/s }
    link      = nvlink 450 GB/s
}
cpu { memory = 12 GiB at 10 GB/s }
"""


def test_the_whole_language_parses():
    file, faults = parse("spec", LANGUAGE)
    assert faults == []
    kinds = [type(d).__name__ for d in file.declarations]
    assert kinds.count("Import") == 2
    assert kinds.count("ModelDeclaration") == 2
    assert kinds.count("Section") == 7
    assert kinds.count("Prefer") == 1


def test_spans_point_at_the_text():
    text = 'cluster pod {\n    node = 8 * gpu("T4")  # eight\n}\n'
    file, _ = parse("spec", text)
    section = file.declarations[0]
    assert isinstance(section, syntax.Section)
    setting = section.body[0]
    assert isinstance(setting, syntax.Setting)
    span = setting.value.span
    assert (span.line, span.column, span.end_line, span.end_column) == (2, 12, 2, 25)
    assert text.split("\n")[1][span.column - 1 : span.end_column - 1] == '8 * gpu("T4")'


def test_keywords_may_be_keys():
    _, faults = parse("spec", "train { model = a; plan = b; gpu = c; import = d; in = e; per = f }")
    assert faults == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("train {\n a = = 1\n b = 2\n}\ncluster c { d = ) }", None),
        ("train {\n a = = 1\n b = 2\n c = 3 4\n}\n", [2, 4]),
        ("modle x { a = 1 }\ntrain { b = * }\n", [1, 2]),
        ("train { a = 1\n b , 2\n c = 3 }\n", [2]),
        ("budget { memory = 72 Gobs per gpu }\nplan { tensor = }\n", [1, 2]),
    ],
)
def test_each_bad_statement_is_one_message(text, wrong):
    file, faults = parse("spec", text)
    if wrong is None:
        assert [f.code for f in faults] == ["E0102"]
        assert file.declarations == ()
    else:
        assert [f.span.line for f in faults if f.span] == wrong
        assert {f.code for f in faults} == {"E0101"}


def test_the_rest_is_read():
    file, _ = parse("spec", "train { a = = 1; b = 2 }\nbudget { c = 3 }\n")
    bodies = [d.body for d in file.declarations if isinstance(d, syntax.Section)]
    assert [[s.key.text for s in body if isinstance(s, syntax.Setting)] for body in bodies] == [
        ["b"],
        ["c"],
    ]


def test_a_large_file_is_refused_at_once():
    start = time.perf_counter()
    _, faults = parse("spec", "# long\n" * (10 * 2**20 // 7))
    assert [f.code for f in faults] == ["E0004"]
    assert time.perf_counter() - start < 2


def test_the_largest_file_takes_seconds():
    line = "    x = x + attention(rmsnorm(x), heads=8, kv_heads=4, causal)\n"
    text = "model m {\n" + line * ((MAX_BYTES - 100) // len(line)) + "}\n"
    start = time.perf_counter()
    _, faults = parse("spec", text)
    assert faults == []
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize("opener", ["(", "[", "{ a: "])
def test_nesting_is_bounded(opener):
    _, faults = parse("spec", "train { x = " + opener * 5000)
    assert [f.code for f in faults] == ["E0005"]


def test_long_chains_do_not_overflow():
    for text in ("1" + " + 1" * 20_000, "a" + " -> a" * 20_000, "-1" + " * -1" * 10_000):
        _, faults = parse("spec", f"model m {{ x = {text} }}")
        assert faults == []


def test_the_grammar_has_no_conflicts():
    assert parser() is parser()
