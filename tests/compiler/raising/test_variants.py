"""Small models in many spellings: raised as far as they should, equal to the module itself."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.ops.attention import attention
from llmspec.compiler.ops.linear import linear
from llmspec.compiler.ops.registry import choices, entry_of
from llmspec.compiler.ops.weights import scores
from llmspec.compiler.raising import check_raised, raise_model, record
from tests.models import variants
from tests.models.plain_gpt import GPT
from tests.models.variants import Model

TOLERANCE = 1e-9


def gpt(**options: object) -> Callable[[], nn.Module]:
    sizes = {"block_size": 32, "vocab_size": 61, "n_layer": 2, "n_head": 4, "n_embd": 32}
    return lambda: GPT(**sizes, **options)


def of(**options: object) -> Callable[[], nn.Module]:
    return lambda: Model(**options)


RAISED: dict[str, Callable[[], nn.Module]] = {
    "gpt": gpt(),
    "gpt written out": gpt(flash=False),
    "gpt without biases": gpt(bias=False, dropout=0.1),
    "gpt dropping weights": gpt(attn_dropout=0.1),
    "gpt dropping weights, written out": gpt(attn_dropout=0.1, flash=False),
    "grouped": of(attention=variants.GroupedAttention),
    "one key head": of(attention=variants.OneKeyAttention),
    "fused, permuted": of(attention=variants.FusedPermuted),
    "fused by head": of(attention=variants.FusedByHead),
    "fused unequally": of(attention=variants.FusedGrouped),
    "rotary by halves": of(attention=variants.HalvesRotary),
    "rotary by pairs": of(attention=variants.PairsRotary),
    "rotary of complex numbers": of(attention=variants.ComplexRotary),
    "normed heads": of(attention=variants.NormedHeads),
    "scaled first": of(attention=variants.ScaledFirst),
    "window": of(attention=variants.Windowed),
    "written layer norm": of(norm=variants.WrittenLayerNorm),
    "nn.RMSNorm": of(norm=nn.RMSNorm),
    "squared relu": of(act=lambda x: F.relu(x).square()),
    "written silu": of(act=lambda x: x * torch.sigmoid(x)),
    "written gelu": of(act=lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
    "parallel": of(block=variants.ParallelBlock),
    "in place": of(block=variants.InPlaceBlock),
    "sinusoids": of(positions=variants.Sinusoids, scale=32**0.5),
}

PARTLY: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "alibi": (of(attention=variants.Alibi), {"scaled_dot_product_attention"}),
    "odd": (of(block=variants.OddBlock), {"cumsum", "sin"}),
}


def raised(build: Callable[[], nn.Module], sequences: int = 2) -> tuple[nn.Module, ModelGraph]:
    module = record(build)
    return module, raise_model(module, "model", sequences=sequences, tokens=16)


def splits(graph: ModelGraph, unit: str, function: object) -> list[set[str]]:
    """By node of this function: the factors over which two ranks may split it."""
    nodes = [n for n in graph.units[unit].calls() if n.target is function]
    return [{c.factor for c in choices(entry_of(n).rule(n), 2) if c.factor} for n in nodes]


@pytest.mark.parametrize("name", RAISED)
def test_raised_whole(name: str) -> None:
    module, graph = raised(RAISED[name])
    assert graph.replicated == ()
    block = graph.instances[1].unit
    assert [i.unit for i in graph.instances] == ["first", block, block, "last"]
    assert check_raised(module, graph).worst() < TOLERANCE
    attended = splits(graph, block, attention) + splits(graph, block, scores)
    heads = "g" if name == "one key head" else "k"
    assert len(attended) == 1
    assert heads == "g" or heads in attended[0]
    assert all("o" in s or "i" in s for s in splits(graph, block, linear))


@pytest.mark.parametrize("name", PARTLY)
def test_raised_in_part(name: str) -> None:
    build, left = PARTLY[name]
    module, graph = raised(build)
    assert left <= {what for _, what in graph.replicated}
    assert check_raised(module, graph).worst() < TOLERANCE


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("name", ["gpt", "sinusoids"])
def test_any_number_of_sequences(name: str, sequences: int) -> None:
    module, graph = raised(RAISED[name], sequences)
    assert graph.sequences == sequences
    shapes = {n.meta["shape"] for n in graph.units["first"].nodes() if n.op == "placeholder"}
    assert shapes == {(sequences, 16)}
    assert check_raised(module, graph).worst() < TOLERANCE


def test_opaque_nodes_are_traced_for_their_own_number_of_sequences() -> None:
    module, graph = raised(of(block=variants.OddBlock, attention=variants.Alibi), 3)
    assert graph.sequences == 3
    assert check_raised(module, graph).worst() < TOLERANCE


def test_values_that_pass_by_the_blocks_make_one_unit() -> None:
    module, graph = raised(variants.SkipModel)
    assert [i.unit for i in graph.instances] == ["first", "last"]
    assert check_raised(module, graph).worst() < TOLERANCE


def test_a_block_used_twice_is_one_unit() -> None:
    module, graph = raised(variants.SharedModel)
    assert [i.prefix for i in graph.instances] == ["", "layers.0", ""]
    assert check_raised(module, graph).worst() < TOLERANCE


class Deeper(Model):
    """Blocks that start differently."""

    def __init__(self) -> None:
        super().__init__(layers=3)
        nn.init.normal_(self.layers[1].mlp.up.weight, std=0.001)


def test_blocks_that_start_differently_are_different_units() -> None:
    _, graph = raised(Deeper)
    assert [i.unit for i in graph.instances[1:-1]] == ["block", "block_2", "block"]


def test_names_are_the_modules_own() -> None:
    module, graph = raised(gpt())
    names = dict(module.named_parameters())
    found = dict(graph.parameters())
    assert found.keys() == names.keys()
    fused = found["transformer.h.1.attn.c_attn.weight"]
    assert (fused.shape, fused.source_shape) == ((3, 32, 32), (96, 32))
    assert found["transformer.h.0.attn.c_proj.weight"].init.b == pytest.approx(0.01)
    head = graph.units["last"].parameters["transformer.wte.weight"]
    assert head.tied == "transformer.wte.weight"
    assert not found["transformer.ln_f.weight"].decay
    assert found["transformer.wpe.weight"].decay


def test_parts_of_a_fused_weight_are_named_by_their_rows() -> None:
    _, graph = raised(of(attention=variants.FusedGrouped))
    parts = [name for name, _ in graph.parameters() if "layers.0" in name and "wqkv.weight" in name]
    assert parts == [
        f"layers.0.attention.wqkv.weight_rows_{a}_{b}" for a, b in ((0, 32), (32, 48), (48, 64))
    ]


def test_dropouts_are_numbered_within_a_unit() -> None:
    _, graph = raised(gpt(dropout=0.1, attn_dropout=0.2))
    nodes = [n for n in graph.units["block"].calls() if "dropout" in str(n.target)]
    assert [n.args[2:] for n in nodes] == [(0.2, 0), (0.1, 1), (0.1, 2)]
    assert graph.dropout


def test_the_same_model_gives_the_same_graph() -> None:
    first, second = (raised(RAISED["rotary by pairs"])[1] for _ in range(2))
    for name, unit in first.units.items():
        lines = [[(n.name, repr(n.args)) for n in u.nodes()] for u in (unit, second.units[name])]
        assert lines[0] == lines[1]
