"""Models of transformers, which nobody shaped for the compiler: raised whole, and equal."""

from collections.abc import Callable

import pytest
from torch import nn

from llmspec.compiler.ops.attention import attention, rotary
from llmspec.compiler.ops.linear import linear
from llmspec.compiler.ops.projection import projection
from llmspec.compiler.raising import check_raised, raise_model, record

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
STRETCHED = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NOBODY = {"bos_token_id": None, "eos_token_id": None}


def model(family: str, options: dict[str, object]) -> Callable[[], nn.Module]:
    """GPT-2 and Llama as everyone calls them; the rest by their families' names."""
    head = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    config = getattr(transformers, f"{family}Config")(**options)
    return lambda: getattr(transformers, head)(config)


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("Llama", GROUPED | {"attn_implementation": "sdpa"}),
    "llama, eager": ("Llama", GROUPED | {"attn_implementation": "eager"}),
    "gpt2": ("GPT2", GPT2 | NOBODY | {"attn_implementation": "sdpa"}),
    "gpt2, eager": ("GPT2", GPT2 | NOBODY | {"attn_implementation": "eager", "attn_pdrop": 0.0}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 5}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "phi3": ("Phi3", GROUPED),
    "llama3.1": ("Llama", GROUPED | {"rope_parameters": STRETCHED}),
    "gptj": ("GPTJ", GPT2 | NOBODY | {"rotary_dim": 8}),
}
LONG = ("llama3.1", "gptj", "phi3", "qwen3")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in CASES]
)
def test_raised_whole(name: str) -> None:
    module = record(model(*CASES[name]))
    graph = raise_model(module, "model", sequences=2, tokens=16)
    assert graph.replicated == ()
    assert len({i.unit for i in graph.instances}) == 3
    assert len(graph.instances) == 4
    assert check_raised(module, graph).worst() < 1e-9
    assert {n for n, _ in graph.parameters() if "_rows_" not in n} <= dict(
        module.named_parameters()
    ).keys()


def test_llama_is_what_the_language_would_build() -> None:
    graph = raise_model(record(model(*CASES["llama"])), "model", sequences=2, tokens=16)
    block = graph.units["llama_decoder_layer"].calls()
    targets = [n.target for n in block]
    assert (targets.count(linear), targets.count(rotary), targets.count(attention)) == (7, 2, 1)
    assert len(block) == 20
    assert [n.args[1] for n in block if n.target is rotary] == [10000.0, 10000.0]
    attended = next(n for n in block if n.target is attention)
    assert attended.args[3:] == (True, None, False)
    assert [n.meta["shape"] for n in attended.args[:3]] == [(2, 16, 4, 8), *[(2, 16, 2, 8)] * 2]


def test_gpt2_keeps_its_weights_input_first() -> None:
    graph = raise_model(record(model(*CASES["gpt2"])), "model", sequences=2, tokens=16)
    block = graph.units["gpt2_block"]
    assert [n.target for n in block.calls()].count(projection) == 4
    fused = block.parameters["attn.c_attn.weight"]
    assert (fused.shape, fused.source_shape) == ((32, 3, 32), (32, 96))


def test_a_window_is_seen() -> None:
    graph = raise_model(record(model(*CASES["mistral"])), "model", sequences=2, tokens=16)
    nodes = graph.units["mistral_decoder_layer"].calls()
    attended = next(n for n in nodes if n.target is attention)
    assert attended.args[3:5] == (True, 5)


def test_an_operator_of_another_library_is_refused() -> None:
    from llmspec.compiler.errors import Unsupported

    experts = GROUPED | {"num_local_experts": 4}
    with pytest.raises(
        Unsupported, match=r"`model\.layers\.0\.mlp\.experts`, which is not PyTorch"
    ):
        raise_model(record(model("Mixtral", experts)), "model", sequences=2, tokens=16)
