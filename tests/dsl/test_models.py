from __future__ import annotations

import pytest

from llmspec.dsl import SpecError
from llmspec.dsl.parameters import count_blocks, count_parameters, operators_of
from llmspec.dsl.program import BlockUse, Model, Operator, Ref, Repeat
from tests.dsl.specs import CLUSTER, MIXED, SPEC, TRAIN, program


def model(body: str, head: str = "vocab = 256; context = 128; width = 64") -> Model:
    made = program(f"model tiny {{\n{head}\n{body}\n}}\n{CLUSTER}{TRAIN}").model
    assert isinstance(made, Model)
    return made


def refused(body: str) -> list[str]:
    with pytest.raises(SpecError) as error:
        model(body)
    return [d.code for d in error.value.diagnostics]


def test_a_chain_becomes_bindings():
    made = program(SPEC).model
    assert isinstance(made, Model)
    assert [b.name for b in made.body] == ["embed", "layer", "rmsnorm", "unembed"]
    assert made.inputs == ("tokens",)
    repeat = made.body[1].value
    assert isinstance(repeat, Repeat)
    assert (repeat.count, repeat.input) == (4, Ref("embed"))
    assert [u.name for u in repeat.body] == ["layer"]
    assert repeat.body[0].inputs == (Ref(""),)


def test_options_are_all_there():
    made = program(SPEC).model
    assert isinstance(made, Model)
    attention = next(operators_of(made, "attention"))
    assert dict(attention.options) == {
        "width": 64,
        "heads": 8,
        "kv_heads": 4,
        "head_size": 8,
        "rope": None,
        "causal": True,
        "bias": False,
        "window": None,
        "explicit": False,
        "dropout": 0.0,
        "qk_norm": None,
    }
    assert list(dict(attention.options)) == sorted(dict(attention.options))
    assert next(operators_of(made, "embed")).option("positions") is None


def test_instances_have_names_of_their_own():
    made = program(SPEC).model
    assert isinstance(made, Model)
    names = [u.name for u in operators_of(made, "rmsnorm")]
    assert sorted(names) == ["rmsnorm", "rmsnorm", "rmsnorm_2"]  # two in the block, one outside


def test_shared_instances_share_their_name():
    made = program(MIXED).model
    assert isinstance(made, Model)
    near = made.block("near")
    names = {u.name for u in operators_of(made, "mlp") if u.option("ffn") == 64 and u.name == "f"}
    assert names == {"f"}
    assert near.inputs == ("x",)
    unembed = made.body[-1].value
    assert isinstance(unembed, Operator) and unembed.option("tied") == "table"
    assert [b.name for b in made.body if getattr(b.value, "name", "") == "shared"] == [
        "shared",
        "shared_2",
    ]


def test_a_block_with_other_options_is_another_block():
    made = program(MIXED).model
    assert isinstance(made, Model)
    assert [b.name for b in made.blocks] == ["near", "far", "far_2", "cross"]
    repeat = next(b.value for b in made.body if isinstance(b.value, Repeat))
    assert [u.block for u in repeat.body if isinstance(u, BlockUse)] == ["near", "far"]
    assert count_blocks(made) == 2 * 4 + 1 + 2


def test_widths_are_followed():
    made = model(
        """block layer(x) { h = gelu(linear(x, 3 * width)); x = x + linear(h) }
        tokens -> embed(width=16) -> linear(width) -> layer * 2 -> unembed"""
    )
    widths = [(u.option("width"), u.option("out")) for u in operators_of(made, "linear")]
    assert sorted(widths) == [(16, 64), (64, 192), (192, 64)]
    assert next(operators_of(made, "gelu")).option("width") == 192


def test_arithmetic_and_constants():
    made = model(
        """heads = 8; size = width / heads
        block layer(x) { h = 1 / 2; x = h * x + attention(x, heads=heads, head_size=size * 2) }
        tokens -> embed -> layer -> unembed"""
    )
    attention = next(operators_of(made, "attention"))
    assert attention.option("head_size") == 16
    assert attention.option("width") == 64


def test_nested_repetition_is_written_out():
    made = model(
        """block a(x) { x = x + mlp(x) }
        block b(x) { x = x + swiglu(x, ffn=8) }
        tokens -> embed -> (a * 2 -> b) * 3 -> unembed"""
    )
    repeat = made.body[1].value
    assert isinstance(repeat, Repeat)
    assert [u.name for u in repeat.body] == ["a", "a_2", "b"]
    assert made.body[1].name == "a_b"


@pytest.mark.parametrize(
    ("source", "name", "millions"),
    # sizes: the releases' own counts (tied weights once)
    [
        ("gpt2", "gpt2_small", 124.44),
        ("gpt2", "gpt2_medium", 354.82),
        ("gpt2", "gpt2_large", 774.03),
        ("gpt2", "gpt2_xl", 1557.61),
        ("llama", "llama2_7b", 6738.42),
        ("llama", "llama2_13b", 13015.86),
        ("llama", "llama2_70b", 68976.65),
        ("llama", "llama3_8b", 8030.26),
        ("llama", "llama3_70b", 70553.71),
        ("llama", "llama3_405b", 405853.39),
        ("llama", "llama3_2_1b", 1235.81),
        ("llama", "llama3_2_3b", 3212.75),
    ],
)
def test_library_models_have_the_published_sizes(source, name, millions):
    text = f"import {source}\n{CLUSTER}{TRAIN.replace('tiny', name)}"
    made = program(text).model
    assert isinstance(made, Model)
    assert round(count_parameters(made) / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("source", "name", "millions", "active"),
    # the reports round to 46.7 and 12.9, 141 and 39, 30.5 and 3.3, 235 and 22, 671 and 37 billion
    [
        ("mixtral", "mixtral_8x7b", 46702.79, 12879.93),
        ("mixtral", "mixtral_8x22b", 140630.07, 39161.47),
        ("qwen3_moe", "qwen3_30b_a3b", 30532.12, 3353.03),
        ("qwen3_moe", "qwen3_235b_a22b", 235093.63, 22190.76),
        ("deepseek", "deepseek_v3_671b", 671026.40, 37552.28),
    ],
)
def test_mixtures_have_the_published_sizes(source, name, millions, active):
    text = f"import {source}\n{CLUSTER}{TRAIN.replace('tiny', name)}"
    made = program(text).model
    assert isinstance(made, Model)
    assert round(count_parameters(made) / 1e6, 2) == millions
    assert round(count_parameters(made, active=True) / 1e6, 2) == active


@pytest.mark.parametrize(
    ("body", "codes"),
    [
        (
            "block a(x) { x = b(x) }\nblock b(x) { x = a(x) }\ntokens -> embed -> a -> unembed",
            "E0214",
        ),
        ("block a(x, y) { x = x + y }\ntokens -> embed -> a -> unembed", "E0209"),
        ("block a(x) { x = tokens }\ntokens -> embed -> a -> unembed", "E0201"),
        ("block a(x) { x = x + 1 / 0 }\ntokens -> embed -> a -> unembed", "E0303"),
        ("tokens -> embed -> mlp(ffn=1.5) -> unembed", "E0303"),
        ("tokens -> embed -> mlp(ffn=4 GiB) -> unembed", "E0302"),
        ("tokens -> embed -> gelu * 0 -> unembed", "E0303"),
        ("tokens -> embed -> gelu + gelu -> unembed", "E0212"),
        ("tokens -> embed -> unembed -> gelu", "E0207"),
        ("let embed = tokens -> embed\nembed -> unembed", "E0217"),
        ("tokens -> embed(positions=rotary) -> unembed", "E0504"),
        ("tokens -> embed(positions=sinusoidal) -> unembed", "E0601"),
    ],
)
def test_faults(body, codes):
    assert codes in refused(body)


def test_growth_is_bounded():
    blocks = ["block b0(x) { x = x + mlp(x) }"]
    blocks += [f"block b{i}(x) {{ x = b{i - 1}(b{i - 1}(x)) }}" for i in range(1, 60)]
    assert refused("\n".join(blocks) + "\ntokens -> embed -> b59 -> unembed") == ["E0213"]
    assert "E0213" in refused("tokens -> embed -> ((gelu * 100) * 100) * 100 -> unembed")


def test_python_and_hugging_face_models(tmp_path):
    (tmp_path / "mine.py").write_text("raise SystemExit('must not run')\n")
    (tmp_path / "config.json").write_text("{}")
    tail = CLUSTER + TRAIN.replace("steps", "sequence_length = 64; steps")
    from llmspec.dsl import load

    path = tmp_path / "spec.llmspec"
    path.write_text(
        f'model tiny = python("mine.py", "Net", dim=512, names=["a", "b"], on=true)\n{tail}'
    )
    made = load(path).model
    assert made.arguments == (("dim", 512), ("names", ("a", "b")), ("on", True))  # type: ignore[union-attr]
    path.write_text(f'model tiny = huggingface("config.json")\n{tail}')
    assert load(path).model.path == "config.json"  # type: ignore[union-attr]
