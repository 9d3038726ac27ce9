"""What the ledger calls activations against what autograd keeps of the emitted program."""

import sys
import types
from pathlib import Path

import pytest
import torch

from llmspec import dsl
from llmspec.compiler.build.model import build_model
from llmspec.compiler.emit.model import ModelPrinter
from llmspec.compiler.lower import lower
from llmspec.compiler.precision import Precision
from llmspec.compiler.search import search
from tests.compiler.specs import CPU, cluster, gpt, llama, pin, program
from tests.processes import run

ROOT = Path(__file__).parents[3]
MIXTURE = """
model m {{
    vocab = 512; context = 64; width = 64
    block layer(x) {{
        x = x + {attention}
        x = x + moe(rmsnorm(x), {experts})
    }}
    tokens -> embed -> layer * 2 -> rmsnorm -> unembed
}}
cluster c {{ node = 2 * cpu }}
train {{ model = m; cluster = c; dataset = synthetic; batch = 2 sequences; steps = 1 }}
"""
PLAIN = "attention(rmsnorm(x), heads=4, kv_heads=2, rope=10_000, causal)"
LATENT = (
    "latent_attention(rmsnorm(x), heads=4, q_rank=32, kv_rank=24, nope=16, rope_size=8, value=12, "
    "causal)"
)


def mixture(experts: str, attention: str = PLAIN):
    return dsl.load("t.llmspec", text=MIXTURE.format(attention=attention, experts=experts)).model


MODELS = {
    "plain experts": mixture("experts=4, top_k=2, expert=swiglu(ffn=48)"),
    "losses": mixture(
        "experts=4, top_k=2, expert=swiglu(ffn=48), shared=swiglu(ffn=64), balance=aux(0.1), "
        "z_loss=0.1"
    ),
    "sigmoid": mixture(
        "experts=8, top_k=3, expert=mlp(ffn=48, bias), gate=sigmoid, scale=2.5, "
        "balance=bias(0.1, aux=0.1)"
    ),
    # a capacity that nothing is over: what is dropped is not kept
    "capacity": mixture("experts=8, top_k=3, expert=geglu(ffn=48), normalise=false, capacity=4"),
    "latent": mixture("experts=4, top_k=2, expert=swiglu(ffn=48)", LATENT),
    # a mask, for which shared heads are repeated
    "window": mixture(
        "experts=4, top_k=2, expert=swiglu(ffn=48)", PLAIN.replace("causal", "causal, window=20")
    ),
    "written out": mixture(
        "experts=4, top_k=2, expert=swiglu(ffn=48)", PLAIN.replace("causal", "causal, explicit")
    ),
    "llama": llama(layers=2, width=64, heads=4, kv_heads=2, ffn=176, vocab=512, context=64),
    "gpt": gpt(layers=2, width=64, heads=4, vocab=512, context=64),
}


def kept_bytes(model, inputs) -> int:
    """Bytes of the distinct floating or boolean storages that autograd holds, parameters apart."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    sharded = [p for p in model.parameters() if hasattr(p, "to_local")]
    own |= {p.to_local().untyped_storage()._cdata for p in sharded}
    held, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        alive.append(tensor)
        if storage._cdata not in own and tensor.dtype in (torch.float32, torch.bool):
            held[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(*inputs)
    return sum(held.values())


def shared_mask(name: str) -> int:
    """All layers that write the square out share the mask, which is not counted."""
    return MODELS[name].context ** 2 if name in ("written out", "dropped") else 0


def planned(name: str, ranks: int, *more):
    """(source of model.py, predicted bytes of activations)."""
    model, pins = MODELS[name], [pin("microbatch", 2), *more]
    spec = program(model, cluster(1, ranks, CPU), batch=2, precision="fp32", plan=tuple(pins))
    found = search(spec, lambda b: build_model(model, sequences=b, tokens=model.context))
    lowered = lower(build_model(model, sequences=2, tokens=model.context), found.plan)
    printer = ModelPrinter(
        lowered=lowered, precision=Precision(compute="fp32"), seed=1, spec="test"
    )
    text = printer.print()
    return text, found.plan.predicted["predicted"]["memory_bytes"]["activations"]


def measured(rank: int, text: str, sizes: dict[str, int], tokens: int) -> int:
    """`tokens`: of this rank."""
    module = types.ModuleType("model")
    sys.path.insert(0, str(ROOT))
    exec(compile(text, "model.py", "exec"), module.__dict__)
    from runtime.mesh import Mesh

    emitted = module.Model(Mesh.create(torch.device("cpu"), **sizes))
    emitted.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in emitted.parameters():
            parameter.fill_(0.01)
    ids = torch.zeros(2, tokens, dtype=torch.int64)
    return kept_bytes(emitted, (ids, ids, torch.arange(2)))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("ranks", "sequence"), [(1, "off"), (2, "on"), (2, "off")])
def test_activations_are_what_autograd_keeps(name, ranks, sequence):
    pins = [pin("sequence", sequence)] if ranks > 1 else []
    text, predicted = planned(name, ranks, pin("tensor", ranks), *pins)
    for real in run(ranks, measured, text, {"tensor": ranks}, MODELS[name].context):
        # the loss keeps a few numbers a row besides
        assert real - shared_mask(name) == pytest.approx(predicted, rel=0.002)


def test_dropped_weights_keep_five_bytes_where_numbers_have_two(monkeypatch):
    """Weights, the mask, what is left of them; in float32 here."""
    attention = PLAIN.replace("causal", "causal, dropout=0.1")
    model = mixture("experts=4, top_k=2, expert=swiglu(ffn=48)", attention)
    monkeypatch.setitem(MODELS, "dropped", model)
    text, predicted = planned("dropped", 1)
    (real,) = run(1, measured, text, {}, model.context)
    assert real - shared_mask("dropped") == pytest.approx(predicted, rel=0.002)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("style", ["ring", "gather", "ulysses"])
def test_activations_of_context_ranks(name, style):
    pins = [pin("context", 2), pin("context_style", style), pin("zero", 0)]
    text, predicted = planned(name, 2, *pins)
    for real in run(2, measured, text, {"context": 2}, MODELS[name].context // 2):
        beside = shared_mask(name) if style == "ulysses" else 0
        assert real - beside == pytest.approx(predicted, rel=0.002)
