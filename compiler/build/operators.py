"""What each operator of the language means in the dialect: one function per operator.

Each gets the builder (its scope is the operator's instance), the operator's input values and its
options, and returns its result. Values are [B, T, width].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from torch import fx

from llmspec.compiler.build.builder import UnitBuilder
from llmspec.compiler.graph import Init
from llmspec.compiler.ops import elementwise, shape, weights
from llmspec.compiler.ops.attention import attention, rotary
from llmspec.compiler.ops.dropout import dropout
from llmspec.compiler.ops.embedding import embedding, positions
from llmspec.compiler.ops.linear import linear
from llmspec.compiler.ops.norm import layer_norm, layer_norm_no_bias, rms_norm


class Context(NamedTuple):
    """What an operator may need of its surroundings.

    depth: layers in the model, for the initial scale of what writes into the residual stream.
    samples: makes the input of global sample counters when dropout asks for it.
    next_dropout: numbers the dropout operators of the whole unit.
    tied_table: full name of the table that `unembed(tied=…)` uses, and its shape.
    """

    depth: int
    samples: Callable[[], fx.Node]
    next_dropout: Callable[[], int]


Options = dict[str, Any]
Inputs = tuple[fx.Node, ...]

WEIGHTS = Init("normal", 0.0, 0.02)
"""GPT-2's and Llama's initial scale of weights (Radford et al. 2019)."""


def _last(x: fx.Node) -> int:
    return x.meta["shape"][-1]


def _linear(
    b: UnitBuilder,
    x: fx.Node,
    name: str,
    width: int,
    letter: str,
    *,
    bias: bool,
    init: Init = WEIGHTS,
    label: str | None = None,
) -> fx.Node:
    """x […, I] -> […, width]; the bias is an addition of its own, so that it follows a sum over
    ranks.
    """
    lead = x.meta["dims"][:-1]
    dims = letter + x.meta["dims"][-1]
    weight = b.parameter(name, (width, _last(x)), dims, init)
    y = b.call(linear, x, weight, label=label or name, dims=lead + letter)
    if not bias:
        return y
    offset = b.parameter(f"{name}_bias", (width,), letter, Init("constant", 0.0), decay=False)
    return b.call(elementwise.add, y, offset, label=label or name, dims=lead + letter)


def residual_init(context: Context) -> Init:
    """Scaled down by the number of additions into the residual stream (Radford et al. 2019)."""
    return replace(WEIGHTS, additions=2 * max(context.depth, 1))


def build_linear(b: UnitBuilder, inputs: Inputs, o: Options, _: Context) -> fx.Node:
    x = inputs[0]
    letter = "D" if o["out"] == _last(x) else "F"
    return _linear(b, x, "weight", o["out"], letter, bias=o["bias"], label="y")


def _heads(b: UnitBuilder, x: fx.Node, name: str, o: Options, kv: bool) -> fx.Node:
    """x [B, T, D] -> [B, T, heads, head size]."""
    heads, size = o["kv_heads"] if kv else o["heads"], o["head_size"]
    y = _linear(b, x, name, heads * size, "J" if kv else "I", bias=o["bias"])
    dims = ("BSKE" if kv else "BTHE") if kv and o["over"] else "BTKE" if kv else "BTHE"
    return b.call(shape.unflatten, y, (heads, size), label=name, dims=dims)


def _head_norm(b: UnitBuilder, x: fx.Node, name: str, eps: float) -> fx.Node:
    """x [B, T, heads, E]: each head by itself, one weight [E] for all of them."""
    with b.scope(name):
        weight = b.parameter("weight", (_last(x),), "E", Init("constant", 1.0), decay=False)
        return b.call(rms_norm, x, weight, eps, label=x.meta["label"], dims=x.meta["dims"])


def _of_heads(
    b: UnitBuilder, x: fx.Node, name: str, heads: int, size: int, letters: str, dims: str
) -> fx.Node:
    """x [B, T, I] -> [B, T, heads, size]. letters: of the folded dimension, and of the size."""
    y = _linear(b, x, name, heads * size, letters, bias=False)
    return b.call(shape.unflatten, y, (heads, size), label=name, dims=dims)


def _low_rank(b: UnitBuilder, x: fx.Node, name: str, rank: int, letter: str, eps: float) -> fx.Node:
    """Down to `rank` numbers a token, normed."""
    low = _linear(b, x, f"{name}_down", rank, letter, bias=False, label=f"{name}_low")
    with b.scope(f"{name}_norm"):
        weight = b.parameter("weight", (rank,), letter, Init("constant", 1.0), decay=False)
        return b.call(rms_norm, low, weight, eps, label=f"{name}_low", dims=low.meta["dims"])


def build_latent_attention(b: UnitBuilder, inputs: Inputs, o: Options, context: Context) -> fx.Node:
    """Queries, keys and values through low ranks; positions in a part of their own, one key's for
    all heads.

    Source: DeepSeek-V2, arXiv 2405.04434, 2.1.
    """
    x, heads, rope = inputs[0], o["heads"], float(o["rope"])
    source = x if o["q_rank"] is None else _low_rank(b, x, "q", o["q_rank"], "Q", o["eps"])
    low = _low_rank(b, x, "kv", o["kv_rank"], "L", o["eps"])
    sizes = {"nope": o["nope"], "rope": o["rope_size"], "value": o["value"]}
    q = _of_heads(b, source, "q", heads, sizes["nope"], "I", "BTHN")
    q_rope = _of_heads(b, source, "q_rope", heads, sizes["rope"], "G", "BTHO")
    k = _of_heads(b, low, "k", heads, sizes["nope"], "I", "BTHN")
    k_rope = _of_heads(b, x, "k_rope", 1, sizes["rope"], "O", "BTUO")
    v = _of_heads(b, low, "v", heads, sizes["value"], "J", "BTHM")
    q_rope, k_rope = (
        b.call(rotary, part, rope, label=part.meta["label"], dims=part.meta["dims"])
        for part in (q_rope, k_rope)
    )
    q = b.call(shape.join, q, q_rope, label="q", dims="BTHE")
    k = b.call(shape.join, k, k_rope, label="k", dims="BTHE")
    mixed = b.call(
        attention, q, k, v, o["causal"], None, o["explicit"], label="mixed", dims="BTHM"
    )
    joined = b.call(shape.flatten, mixed, 2, label="mixed", dims="BTJ")
    init = residual_init(context)
    return _linear(b, joined, "out", _last(x), "D", bias=False, init=init)


def build_attention(b: UnitBuilder, inputs: Inputs, o: Options, context: Context) -> fx.Node:
    x = inputs[0]
    source = inputs[1] if len(inputs) > 1 else x
    o = o | {"over": len(inputs) > 1}
    q, k, v = _heads(b, x, "q", o, False), *(_heads(b, source, n, o, True) for n in "kv")
    if o["qk_norm"] is not None:
        q, k = (_head_norm(b, h, f"{n}_norm", o["qk_norm"]) for h, n in ((q, "q"), (k, "k")))
    if o["rope"] is not None:
        q, k = (
            b.call(rotary, h, float(o["rope"]), label=h.meta["label"], dims=h.meta["dims"])
            for h in (q, k)
        )
    if o["dropout"]:
        mixed = _dropped_attention(b, (q, k, v), o, context)
    else:
        mixed = b.call(
            attention, q, k, v, o["causal"], o["window"], o["explicit"], label="mixed", dims="BTHE"
        )
    joined = b.call(shape.flatten, mixed, 2, label="mixed", dims="BTI")
    init = residual_init(context)
    return _linear(b, joined, "out", _last(x), "D", bias=o["bias"], init=init)


def _dropped_attention(
    b: UnitBuilder, qkv: tuple[fx.Node, fx.Node, fx.Node], o: Options, context: Context
) -> fx.Node:
    """Attention in its steps: kernels that write no square out draw masks of their own, which no
    other placement would draw."""
    q, k, v = qkv
    square = b.call(weights.scores, q, k, label="scores", dims="BHTS")
    seen = o["causal"], o["window"]
    kept = b.call(weights.masked_softmax, square, *seen, label="weights", dims="BHTS")
    number = context.next_dropout()
    kept = b.call(
        dropout, kept, context.samples(), o["dropout"], number, label="dropped", dims="BHTS"
    )
    return b.call(weights.mixture, kept, v, label="mixed", dims="BTHE")


def build_mlp(b: UnitBuilder, inputs: Inputs, o: Options, context: Context) -> fx.Node:
    x = inputs[0]
    hidden = _linear(b, x, "up", o["ffn"], "F", bias=o["bias"])
    act = elementwise.ACTIVATIONS[o["activation"]]
    hidden = b.call(act, hidden, label="hidden", dims="BTF")
    init = residual_init(context)
    return _linear(b, hidden, "down", _last(x), "D", bias=o["bias"], init=init)


def _gated(activation: Callable[..., Any]) -> Builder:
    def build(b: UnitBuilder, inputs: Inputs, o: Options, context: Context) -> fx.Node:
        x = inputs[0]
        gate = _linear(b, x, "gate", o["ffn"], "F", bias=False)
        up = _linear(b, x, "up", o["ffn"], "F", bias=False)
        gate = b.call(activation, gate, label="gate", dims="BTF")
        hidden = b.call(elementwise.multiply, gate, up, label="hidden", dims="BTF")
        init = residual_init(context)
        return _linear(b, hidden, "down", _last(x), "D", bias=False, init=init)

    return build


def build_rmsnorm(b: UnitBuilder, inputs: Inputs, o: Options, _: Context) -> fx.Node:
    x = inputs[0]
    weight = b.parameter("weight", (_last(x),), "D", Init("constant", 1.0), decay=False)
    return b.call(rms_norm, x, weight, o["eps"], label="normed", dims=x.meta["dims"])


def build_layernorm(b: UnitBuilder, inputs: Inputs, o: Options, _: Context) -> fx.Node:
    x = inputs[0]
    weight = b.parameter("weight", (_last(x),), "D", Init("constant", 1.0), decay=False)
    dims = x.meta["dims"]
    if not o["bias"]:
        return b.call(layer_norm_no_bias, x, weight, o["eps"], label="normed", dims=dims)
    bias = b.parameter("bias", (_last(x),), "D", Init("constant", 0.0), decay=False)
    return b.call(layer_norm, x, weight, bias, o["eps"], label="normed", dims=dims)


def build_embed(b: UnitBuilder, inputs: Inputs, o: Options, _: Context) -> fx.Node:
    ids = inputs[0]
    init = WEIGHTS
    table = b.parameter("table", (o["vocab"], o["width"]), "VD", init)
    x = b.call(embedding, ids, table, label="x", dims="BTD")
    if o["positions"] != "learned":
        return x
    places = b.parameter("positions", (o["context"], o["width"]), "CD", init)
    rows = b.call(positions, ids, places, label="places", dims="TD")
    return b.call(elementwise.add, x, rows, label="x", dims="BTD")


def build_unembed(b: UnitBuilder, inputs: Inputs, o: Options, _: Context) -> fx.Node:
    x = inputs[0]
    init = WEIGHTS
    if o["tied"] is None:
        table = b.parameter("table", (o["vocab"], _last(x)), "VD", init)
    else:
        path = f"{o['tied']}.table"
        table = b.parameter("table", (o["vocab"], _last(x)), "VD", init, path=path, tied=path)
    logits = b.call(linear, x, table, label="logits", dims="BTV")
    if not o["bias"]:
        return logits
    bias = b.parameter("bias", (o["vocab"],), "V", Init("constant", 0.0), decay=False)
    return b.call(elementwise.add, logits, bias, label="logits", dims="BTV")


def build_dropout(b: UnitBuilder, inputs: Inputs, o: Options, context: Context) -> fx.Node:
    x = inputs[0]
    if o["p"] == 0:
        return x
    number = context.next_dropout()
    return b.call(
        dropout, x, context.samples(), o["p"], number, label="dropped", dims=x.meta["dims"]
    )


def _activation(name: str) -> Builder:
    def build(b: UnitBuilder, inputs: Inputs, o: Options, _: Context) -> fx.Node:
        x = inputs[0]
        return b.call(elementwise.ACTIVATIONS[name], x, label="hidden", dims=x.meta["dims"])

    return build


Builder = Callable[[UnitBuilder, Inputs, Options, Context], fx.Node]

OPERATORS: dict[str, Builder] = {
    "linear": build_linear,
    "attention": build_attention,
    "latent_attention": build_latent_attention,
    "mlp": build_mlp,
    "swiglu": _gated(elementwise.silu),
    "geglu": _gated(elementwise.gelu),
    "rmsnorm": build_rmsnorm,
    "layernorm": build_layernorm,
    "embed": build_embed,
    "unembed": build_unembed,
    "dropout": build_dropout,
    **{name: _activation(name) for name in elementwise.ACTIVATIONS},
}
