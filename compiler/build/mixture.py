"""What a mixture of experts means in the dialect.

Values: x [B, T, D], the experts that each token picks [B, T, P], their rows [R, …].
"""

from __future__ import annotations

from torch import fx

from llmspec.compiler.build.builder import UnitBuilder
from llmspec.compiler.build.operators import (
    OPERATORS,
    WEIGHTS,
    Context,
    Inputs,
    Options,
    residual_init,
)
from llmspec.compiler.graph import Buffer, Init
from llmspec.compiler.ops import elementwise
from llmspec.compiler.ops.experts import combine, dispatch, grouped_bias, grouped_linear
from llmspec.compiler.ops.routing import (
    balance_loss,
    capacity_of,
    choose_experts,
    drop_over_capacity,
    expert_counts,
    expert_order,
    gate_weights,
    router,
    sequence_load,
    z_loss,
)
from llmspec.dsl.program import Call

LOADS = "picks of each expert since the last step, and dropped ones"
BIAS = "added to the scores for choosing alone, so that loads become even"
GATED = {"swiglu": elementwise.silu, "geglu": elementwise.gelu}


def build_moe(b: UnitBuilder, inputs: Inputs, o: Options, context: Context) -> fx.Node:
    x = inputs[0]
    logits = _logits(b, x, o)
    experts = _choices(b, logits, o)
    logits = _losses(b, logits, experts, o, tokens=x.meta["shape"][1])
    load = b.parameter(
        "load", (2, o["experts"]), "UX", Init("constant", 0.0), decay=False,
        buffer=Buffer(kept=False, integer=True, what=LOADS),
    )  # fmt: skip
    drops = o["capacity"] is not None
    weights = b.call(
        gate_weights, logits, experts, o["gate"], o["normalise"], o["scale"], drops,
        label="weights", dims="BTP",
    )  # fmt: skip
    order = b.call(expert_order, experts, drops, label="order", dims="R")
    counts = b.call(expert_counts, experts, load, o["experts"], label="counts", dims="X")
    rows = b.call(dispatch, x, order, o["top_k"], label="rows", dims="RD")
    with b.scope("experts"):
        rows = _experts(b, rows, counts, o, context)
    mixed = b.call(combine, rows, weights, order, label="mixed", dims="BTD")
    return mixed if o["shared"] is None else _with_shared(b, x, mixed, o["shared"], context)


def _logits(b: UnitBuilder, x: fx.Node, o: Options) -> fx.Node:
    shape = (o["experts"], x.meta["shape"][-1])
    weight = b.parameter("router", shape, "XD", WEIGHTS)
    return b.call(router, x, weight, label="logits", dims="BTX")


def _choices(b: UnitBuilder, logits: fx.Node, o: Options) -> fx.Node:
    balance: Call | None = o["balance"]
    arguments = [logits, o["top_k"], o["gate"], o["groups"], o["top_groups"]]
    if balance is not None and balance.name == "bias":
        rate = balance.option("rate")
        assert isinstance(rate, float), "a rate is a number"
        arguments.append(
            b.parameter(
                "bias", (o["experts"],), "X", Init("constant", 0.0), decay=False,
                buffer=Buffer(rate=rate, what=BIAS),
            )
        )  # fmt: skip
    experts = b.call(choose_experts, *arguments, label="experts", dims="BTP")
    if o["capacity"] is None:
        return experts
    rows = capacity_of(o["capacity"], logits.meta["shape"][1], o["top_k"], o["experts"])
    return b.call(drop_over_capacity, experts, o["experts"], rows, label="experts", dims="BTP")


def _losses(
    b: UnitBuilder, logits: fx.Node, experts: fx.Node, o: Options, *, tokens: int
) -> fx.Node:
    """The logits, with the losses that their backward adds."""
    balance: Call | None = o["balance"]
    coefficient = balance and balance.option("coefficient" if balance.name == "aux" else "aux")
    if coefficient:
        load = b.call(sequence_load, experts, o["experts"], label="load", dims="BX")
        logits = b.call(
            balance_loss, logits, load, coefficient, o["gate"], o["top_k"], tokens,
            label="logits", dims="BTX",
        )  # fmt: skip
    if o["z_loss"]:
        logits = b.call(z_loss, logits, o["z_loss"], label="logits", dims="BTX")
    return logits


def _stack(
    b: UnitBuilder,
    rows: fx.Node,
    counts: fx.Node,
    name: str,
    width: int,
    letters: str,
    o: Options,
    *,
    bias: bool,
    init: Init = WEIGHTS,
    label: str | None = None,
) -> fx.Node:
    """rows [R, I] -> [R, width], a weight for each expert. letters: of the result and of I."""
    count, picks = o["experts"], o["top_k"]
    shape = (count, width, rows.meta["shape"][-1])
    weight = b.parameter(name, shape, f"X{letters}", init, picks=picks)
    dims, label = f"R{letters[0]}", label or name
    y = b.call(grouped_linear, rows, weight, counts, label=label, dims=dims)
    if not bias:
        return y
    offset = b.parameter(
        f"{name}_bias", (count, width), f"X{letters[0]}", Init("constant", 0.0), decay=False,
        picks=picks,
    )  # fmt: skip
    return b.call(grouped_bias, y, offset, counts, label=label, dims=dims)


def _experts(
    b: UnitBuilder, rows: fx.Node, counts: fx.Node, o: Options, context: Context
) -> fx.Node:
    expert: Call = o["expert"]
    ffn, width = expert.option("ffn"), rows.meta["shape"][-1]
    assert isinstance(ffn, int), "a hidden width is a number"
    bias = bool(dict(expert.options).get("bias", False))
    if expert.name in GATED:
        gate, up = (_stack(b, rows, counts, n, ffn, "FD", o, bias=False) for n in ("gate", "up"))
        gate = b.call(GATED[expert.name], gate, label="gate", dims="RF")
        hidden = b.call(elementwise.multiply, gate, up, label="hidden", dims="RF")
    else:
        activation = elementwise.ACTIVATIONS[str(expert.option("activation"))]
        hidden = _stack(b, rows, counts, "up", ffn, "FD", o, bias=bias)
        hidden = b.call(activation, hidden, label="hidden", dims="RF")
    init = residual_init(context)
    return _stack(
        b, hidden, counts, "down", width, "DF", o, bias=bias, init=init, label="rows"
    )


def _with_shared(
    b: UnitBuilder, x: fx.Node, mixed: fx.Node, shared: Call, context: Context
) -> fx.Node:
    """Plus an expert that every token runs through."""
    with b.scope("shared"):
        every = OPERATORS[shared.name](b, (x,), dict(shared.options), context)
    return b.call(elementwise.add, mixed, every, label="mixed", dims="BTD")
