"""The library's families against the same models in transformers: same weights, float64."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import llmspec.dsl as dsl
from llmspec.compiler.build.model import build_model
from llmspec.compiler.graph import ModelGraph, Unit
from llmspec.compiler.huggingface import from_huggingface, to_huggingface
from llmspec.compiler.raising.check import Wide
from llmspec.compiler.raising.recording import wide_defaults
from llmspec.compiler.reference import Reference

transformers = pytest.importorskip("transformers")

SEQUENCES, TOKENS, VOCABULARY = 3, 16, 97
SPEC = """
import {family}
model m = {model}
cluster laptop {{ node = 1 * cpu }}
train t {{
    model = m
    cluster = laptop
    dataset = synthetic()
    batch = 48 tokens
    sequence_length = 16
    steps = 1
}}
"""


def gpt2() -> tuple[str, str, nn.Module]:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        activation_function="gelu_new",
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    text = f"gpt2(layers=2, width=32, heads=4, vocab={VOCABULARY}, context=64)"
    return "gpt2", text, transformers.GPT2LMHeadModel(config)


def llama(tied: bool) -> tuple[str, str, nn.Module]:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    sizes = f"layers=2, width=32, heads=4, kv_heads=2, ffn=56, vocab={VOCABULARY}, context=64"
    name = "llama_tied" if tied else "llama"
    text = f"{name}({sizes}, rope=500_000)"
    return "llama", text, transformers.LlamaForCausalLM(config)


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "experts_implementation": "eager",  # the grouped one knows no float64
    "tie_word_embeddings": False,
}


def mixtral() -> tuple[str, str, nn.Module]:
    config = transformers.MixtralConfig(
        **SMALL,
        intermediate_size=24,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    sizes = f"layers=2, width=32, heads=4, kv_heads=2, ffn=24, vocab={VOCABULARY}, context=64"
    return "mixtral", f"mixtral({sizes}, experts=4)", transformers.MixtralForCausalLM(config)


def qwen3_moe() -> tuple[str, str, nn.Module]:
    config = transformers.Qwen3MoeConfig(
        **SMALL,
        intermediate_size=40,
        moe_intermediate_size=16,
        num_key_value_heads=2,
        head_dim=12,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        num_experts=6,
        num_experts_per_tok=3,
        norm_topk_prob=True,
    )
    sizes = "layers=2, width=32, heads=4, kv_heads=2, head_size=12, ffn=16, experts=6, top_k=3"
    text = f"qwen3_moe({sizes}, vocab={VOCABULARY}, context=64)"
    return "qwen3_moe", text, transformers.Qwen3MoeForCausalLM(config)


def deepseek_v3(q_rank: int | None) -> tuple[str, str, nn.Module]:
    config = transformers.DeepseekV3Config(
        **SMALL,
        intermediate_size=40,
        moe_intermediate_size=24,
        num_key_value_heads=4,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        first_k_dense_replace=1,
        q_lora_rank=q_rank,
        kv_lora_rank=20,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        rope_interleave=True,
    )
    rank = "none" if q_rank is None else str(q_rank)
    sizes = (
        f"layers=2, dense=1, width=32, heads=4, q_rank={rank}, kv_rank=20, nope=8, rope_size=4, "
        "value=6, ffn=40, expert_ffn=24, experts=8, top_k=3, groups=4, top_groups=2, scale=2.5"
    )
    text = f"deepseek_v3({sizes}, vocab={VOCABULARY}, context=64)"
    return "deepseek", text, transformers.DeepseekV3ForCausalLM(config)


CASES = {
    "gpt2": gpt2,
    "llama": lambda: llama(False),
    "llama_tied": lambda: llama(True),
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "deepseek_v3": lambda: deepseek_v3(16),
    "deepseek_v3_whole_queries": lambda: deepseek_v3(None),
}


def with_logits(graph: ModelGraph) -> ModelGraph:
    """The same model, ending before its loss."""
    last = graph.units["last"]
    copy = fx.Graph()
    copy.graph_copy(last.graph, {})
    for node in list(copy.nodes):
        if node.op == "call_function" and not node.users:
            copy.output(node.args[0])
            copy.erase_node(node)
    changed = Unit(name="last", graph=copy, inputs=last.inputs, parameters=last.parameters)
    return graph.with_units({**graph.units, "last": changed})


def shaken(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data += 0.1 * noise


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[ModelGraph, nn.Module, Tensor, Tensor]:
    with wide_defaults(), Wide():
        family, model, theirs = CASES[request.param]()
        theirs = theirs.double().eval()
        shaken(theirs)
    program = dsl.load("oracle.llmspec", text=SPEC.format(family=family, model=model))
    graph = build_model(program.model, sequences=SEQUENCES, tokens=TOKENS)
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(
        VOCABULARY, (2, SEQUENCES, TOKENS), generator=generator
    ).unbind()
    return graph, theirs, tokens, targets


def named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def test_logits_loss_and_gradients(
    case: tuple[ModelGraph, nn.Module, Tensor, Tensor],
) -> None:
    graph, theirs, tokens, targets = case
    with wide_defaults(), Wide():
        logits = theirs(tokens).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    loss.backward()
    weights = {
        name: nn.Parameter(value.detach().clone())
        for name, value in from_huggingface(named(theirs)).items()
    }
    assert weights.keys() == {name for name, _ in graph.parameters()}
    samples = torch.arange(SEQUENCES)
    ours = Reference(with_logits(graph), weights).loss(tokens, targets, samples)
    torch.testing.assert_close(ours, logits, rtol=1e-12, atol=1e-12)
    own = Reference(graph, weights).loss(tokens, targets, samples)
    own.backward()
    assert abs(own.item() - loss.item()) <= 1e-12 * loss.item()
    wanted = from_huggingface({n: p.grad for n, p in named(theirs).items()})
    total = torch.stack([g.norm() for g in wanted.values()]).norm()
    for name, gradient in wanted.items():
        have = weights[name].grad
        assert have is not None, name
        allowed = 1e-9 * max(gradient.norm().item(), 1e-6 * total.item())
        assert (have - gradient).norm().item() <= allowed, name


def test_names_there_and_back(case: tuple[ModelGraph, nn.Module, Tensor, Tensor]) -> None:
    graph, theirs, _, _ = case
    here = from_huggingface(named(theirs))
    for name, parameter in graph.parameters():
        assert tuple(here[name].shape) == parameter.shape, name
    there = to_huggingface(here)
    assert there.keys() == named(theirs).keys()
    for name, value in named(theirs).items():
        assert torch.equal(there[name], value), name


def test_checkpoints_of_gpt2_leave_the_first_name_out() -> None:
    weights = to_huggingface({"embed.table": torch.ones(4, 2), "embed.positions": torch.ones(3, 2)})
    short = {name.removeprefix("transformer."): value for name, value in weights.items()}
    short |= {"h.0.attn.bias": torch.ones(1), "lm_head.weight": torch.ones(4, 2)}
    assert from_huggingface(short).keys() == {"embed.table", "embed.positions"}


def test_a_tied_head_is_left_out() -> None:
    table = torch.ones(4, 2)
    both = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    assert from_huggingface(both, tied=True).keys() == {"embed.table"}
    assert from_huggingface(both).keys() == {"embed.table", "unembed.table"}


def test_unknown_names_are_said() -> None:
    with pytest.raises(ValueError, match=r"`layer\.0\.mlp\.up` has no name"):
        to_huggingface({"layer.0.mlp.up": torch.ones(1)})
    with pytest.raises(ValueError, match=r"`model\.layers\.0\.self_attn\.q_norm\.bias` is no"):
        from_huggingface({"model.layers.0.self_attn.q_norm.bias": torch.ones(1)})
    with pytest.raises(ValueError, match=r"`layer\.1\.attention\.k` is missing"):
        to_huggingface({"embed.positions": torch.ones(1), "layer.1.attention.q": torch.ones(2, 2)})
