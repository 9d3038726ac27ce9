"""What each operator of the language means in the dialect: one function per operator.

Each gets the builder (its scope is the operator's instance), the operator's input values and its
options, and returns its result. Values are [B, T, width].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import fx

from llmspec.compiler.build.builder import UnitBuilder
from llmspec.compiler.graph import Init
from llmspec.compiler.ops import elementwise, shape
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

STANDARD_DEVIATION = 0.02
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
    deviation: float = STANDARD_DEVIATION,
    label: str | None = None,
) -> fx.Node:
    """x […, I] -> […, width]; the bias is an addition of its own, so that it follows a sum over
    ranks.
    """
    lead = x.meta["dims"][:-1]
    dims = letter + x.meta["dims"][-1]
    weight = b.parameter(name, (width, _last(x)), dims, Init("normal", 0.0, deviation))
    y = b.call(linear, x, weight, label=label or name, dims=lead + letter)
    if not bias:
        return y
    offset = b.parameter(f"{name}_bias", (width,), letter, Init("constant", 0.0), decay=False)
    return b.call(elementwise.add, y, offset, label=label or name, dims=lead + letter)


def residual_deviation(context: Context) -> float:
    """Scaled down by the number of additions into the residual stream (Radford et al. 2019)."""
    return STANDARD_DEVIATION / math.sqrt(2 * max(context.depth, 1))


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


def build_attention(b: UnitBuilder, inputs: Inputs, o: Options, context: Context) -> fx.Node:
    x = inputs[0]
    source = inputs[1] if len(inputs) > 1 else x
    o = o | {"over": len(inputs) > 1}
    q, k, v = _heads(b, x, "q", o, False), *(_heads(b, source, n, o, True) for n in "kv")
    if o["rope"] is not None:
        q, k = (
            b.call(rotary, h, float(o["rope"]), label=h.meta["label"], dims=h.meta["dims"])
            for h in (q, k)
        )
    mixed = b.call(
        attention, q, k, v, o["causal"], o["window"], o["explicit"], label="mixed", dims="BTHE"
    )
    joined = b.call(shape.flatten, mixed, 2, label="mixed", dims="BTI")
    deviation = residual_deviation(context)
    return _linear(b, joined, "out", _last(x), "D", bias=o["bias"], deviation=deviation)


def build_mlp(b: UnitBuilder, inputs: Inputs, o: Options, context: Context) -> fx.Node:
    x = inputs[0]
    hidden = _linear(b, x, "up", o["ffn"], "F", bias=o["bias"])
    act = elementwise.ACTIVATIONS[o["activation"]]
    hidden = b.call(act, hidden, label="hidden", dims="BTF")
    deviation = residual_deviation(context)
    return _linear(b, hidden, "down", _last(x), "D", bias=o["bias"], deviation=deviation)


def _gated(activation: Callable[..., Any]) -> Builder:
    def build(b: UnitBuilder, inputs: Inputs, o: Options, context: Context) -> fx.Node:
        x = inputs[0]
        gate = _linear(b, x, "gate", o["ffn"], "F", bias=False)
        up = _linear(b, x, "up", o["ffn"], "F", bias=False)
        gate = b.call(activation, gate, label="gate", dims="BTF")
        hidden = b.call(elementwise.multiply, gate, up, label="hidden", dims="BTF")
        deviation = residual_deviation(context)
        return _linear(b, hidden, "down", _last(x), "D", bias=False, deviation=deviation)

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
    init = Init("normal", 0.0, STANDARD_DEVIATION)
    table = b.parameter("table", (o["vocab"], o["width"]), "VD", init)
    x = b.call(embedding, ids, table, label="x", dims="BTD")
    if o["positions"] != "learned":
        return x
    places = b.parameter("positions", (o["context"], o["width"]), "CD", init)
    rows = b.call(positions, ids, places, label="places", dims="TD")
    return b.call(elementwise.add, x, rows, label="x", dims="BTD")


def build_unembed(b: UnitBuilder, inputs: Inputs, o: Options, _: Context) -> fx.Node:
    x = inputs[0]
    init = Init("normal", 0.0, STANDARD_DEVIATION)
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
