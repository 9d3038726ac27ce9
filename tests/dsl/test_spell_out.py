"""The explicit text of a program loads to an equal program."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmspec.dsl import explicit, load
from llmspec.dsl.format import format_text
from tests.dsl.specs import CLUSTER, MODEL, ROOT, TRAIN, meaning, program, whole_specs


def round_trip(text: str) -> None:
    first = program(text)
    written = explicit(first)
    again = program(written)
    assert meaning(again) == meaning(first)
    assert explicit(again) == written
    assert format_text(written) == written


@pytest.mark.parametrize("name", sorted(whole_specs()))
def test_examples(name):
    round_trip(whole_specs()[name])


@pytest.mark.parametrize("device", ["T4", "A100-40GB", "GB300", "MI300X", "cpu"])
def test_devices(device):
    node = "2 * cpu" if device == "cpu" else f'4 * gpu("{device}")'
    round_trip(MODEL + TRAIN + f"cluster pod {{ node = {node}; nodes = 2 }}\n")


@pytest.mark.parametrize(
    "precision",
    [
        "fp32(tf32=on)",
        "bf16(master=none, moments=bf16, reduce=bf16, rounding=stochastic)",
        "fp16",
        "fp16(grow_every=10, reduce=fp16)",
        "fp16(scale=1024)",
        "fp16(scale=0.5, moments=bf16)",
    ],
)
def test_precisions(precision):
    round_trip(MODEL + CLUSTER + TRAIN.replace("steps", f"precision = {precision}; steps"))


@pytest.mark.parametrize(
    "batch",
    [
        "ramp(from=8 sequences, to=64 sequences, over=1M tokens)",
        "ramp(from=1Ki tokens, to=8Ki tokens, steps=7, increment=2Ki tokens)",
    ],
)
def test_ramps(batch):
    text = TRAIN.replace("64 sequences", batch).replace("steps = 10", "loss = 2.5; steps = 900")
    round_trip(MODEL + CLUSTER + text)


@pytest.mark.parametrize("name", ["llama3_8b", "llama3_2_1b", "gpt2_xl"])
def test_library(name):
    source = "gpt2" if "gpt2" in name else "llama"
    round_trip(f"import {source}\n{CLUSTER}{TRAIN.replace('tiny', name)}")


def test_python_models(tmp_path):
    (tmp_path / "mine.py").write_text("")
    path = tmp_path / "spec.llmspec"
    tail = CLUSTER + TRAIN.replace("steps", "sequence_length = 64; steps")
    path.write_text(f'model tiny = python("mine.py", "Net", a=0.5, b="x\\"y", c=none)\n{tail}')
    first = load(path)
    assert meaning(load(path, text=explicit(first))) == meaning(first)


def test_golden(golden):
    path = ROOT / "examples" / "quickstart.llmspec"
    golden.check("explicit/quickstart.llmspec", explicit(load(path)))


OPERATORS = st.sampled_from(
    [
        "attention({x}, heads=4, kv_heads=2, causal)",
        "attention({x}, heads=8, rope=10_000, causal, window=8)",
        "mlp({x}, ffn=48, activation=relu, bias)",
        "swiglu({x}, 24)",
        "geglu({x}, ffn=24)",
        "layernorm({x}, bias=false)",
        "rmsnorm({x}, eps=1e-6)",
        "dropout({x}, 0.2)",
        "linear(gelu(linear({x}, 2 * width)), width, bias)",
        "silu({x})",
    ]
)
TENSORS = st.recursive(
    st.just("x"),
    lambda inner: st.one_of(
        st.tuples(OPERATORS, inner).map(lambda p: p[0].format(x=p[1])),
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda p: f"({p[0]} {p[1]} {p[2]})"),
        inner.map(lambda e: f"{e} * 0.5" if e == "x" else f"(-{e} / 3)" if e == "x" else e),
    ),
    max_leaves=6,
)
LINKS = st.lists(
    st.sampled_from(
        ["a", "b", "a * 3", "(a -> b) * 2", "(b * 2 -> rmsnorm) * 2", "layernorm", "shared", "gelu"]
    ),
    max_size=5,
)


@st.composite
def models(draw: st.DrawFn) -> str:
    one, other = draw(TENSORS), draw(TENSORS)
    links = "".join(f" -> {link}" for link in draw(LINKS))
    tied = draw(st.sampled_from(["", "(tied=table)", "(bias)"]))
    middle = draw(st.sampled_from(["start", "start + shared(start)", "(start -> a) - start * 2"]))
    return f"""model tiny {{
        vocab = 60; context = 16; width = 32
        block a(x) {{ x = x + {one} }}
        block b(x) {{ y = a(x); x = y + {other} }}
        let shared = mlp(ffn=8)
        let table = embed(positions=learned)
        let start = tokens -> table
        {middle} -> a -> b{links} -> unembed{tied}
    }}
    {CLUSTER}{TRAIN}"""


@settings(max_examples=60, deadline=None)
@given(models())
def test_random_models(text):
    round_trip(text)
