"""Which experts a token is sent to, with what weights: scores, choices, capacity, loads, losses.

B sequences, T tokens, X experts, P picks of a token, R rows: the picks of all tokens that are kept.
A pick that an expert has no room for is written as its complement: ~e, which is negative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextvars import ContextVar

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from llmspec.compiler.graph import without_gradient
from llmspec.compiler.ops.registry import (
    Entry,
    Localised,
    Printed,
    Rule,
    Saved,
    Shapes,
    index_rule,
    numel,
    register,
    shape_of,
    tensor_operands,
)

AUXILIARY: ContextVar[list[tuple[str, Tensor]] | None] = ContextVar("auxiliary", default=None)
"""Where the reference collects the losses of layers inside the model, by the names of their
operators, as sums over tokens."""


def _added(name: str, loss: Tensor) -> None:
    found = AUXILIARY.get()
    if found is not None:
        found.append((name, loss))


def probabilities(logits: Tensor, gate: str) -> Tensor:
    """logits […, X] -> the share of each expert: softmax, or sigmoids over their sum."""
    if gate == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / scores.sum(-1, keepdim=True)


# --------------------------------------------------------------------------------------------------
# Meanings


def router(x: Tensor, weight: Tensor) -> Tensor:
    """x [B, T, D], weight [X, D] -> logits [B, T, X], float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(wide), weight.to(wide))


def choose_experts(
    logits: Tensor, top_k: int, gate: str, groups: int, top_groups: int, bias: Tensor | None = None
) -> Tensor:
    """logits [B, T, X], bias [X] -> the `top_k` experts of each token, best first [B, T, P].

    groups: the experts lie in so many, and only those of the `top_groups` best are open to a token:
        the ones whose two best experts sum up highest.
    bias: added to the scores for choosing alone.
    Source: DeepSeek-V3, arXiv 2412.19437, 2.1.2.
    """
    scores = logits.sigmoid() if gate == "sigmoid" else logits.softmax(-1)
    if bias is not None:
        scores = scores + bias
    elif groups == 1:
        scores = logits  # in the same order, and no two of them rounded to one
    if groups > 1:
        grouped = scores.unflatten(-1, (groups, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        closed = torch.ones_like(best, dtype=torch.bool)
        closed.scatter_(-1, best.topk(top_groups, -1).indices, False)
        scores = grouped.masked_fill(closed.unsqueeze(-1), float("-inf")).flatten(-2)
    return scores.topk(top_k, -1).indices


def drop_over_capacity(experts: Tensor, count: int, capacity: int) -> Tensor:
    """experts [B, T, P] -> the same, what is over `capacity` of an expert in a sequence as ~e.

    All first picks come before all second ones, and among equals earlier tokens come first.
    """
    by_pick = experts.transpose(1, 2).flatten(1)
    before = F.one_hot(by_pick, count).cumsum(1).gather(2, by_pick.unsqueeze(-1)).squeeze(-1)
    kept = torch.where(before <= capacity, by_pick, ~by_pick)
    return kept.unflatten(1, (experts.shape[2], -1)).transpose(1, 2)


def sequence_load(experts: Tensor, count: int) -> Tensor:
    """experts [B, T, P] -> how many picks of each sequence chose each expert [B, X]."""
    chosen = torch.where(experts < 0, ~experts, experts)
    return F.one_hot(chosen.flatten(1), count).sum(1)


def balance_loss(
    logits: Tensor, load: Tensor, coefficient: float, gate: str, top_k: int, tokens: int
) -> Tensor:
    """logits [B, T, X] as they are; the loss is added to the model's, as its token losses are.

    For a sequence of T tokens it is T · coefficient · X · Σ_e f_e P_e: f_e the share of picks that
    chose expert e, P_e the mean share that the router gave it. Given the load it is a sum over
    tokens. load: [B, X], of whole sequences. tokens: of a whole sequence.
    Source: Fedus et al. 2021 (Switch Transformer), 2.2, per sequence as in DeepSeek-V3.
    """
    share = load.to(logits.dtype) * (logits.shape[-1] / (top_k * tokens))
    loss = coefficient * (probabilities(logits, gate) * share.unsqueeze(1)).sum()
    _added(balance_loss.__name__, loss)
    return logits


def z_loss(logits: Tensor, coefficient: float) -> Tensor:
    """logits [B, T, X] as they are; adds coefficient · logsumexp² of each token to the losses.

    Source: Zoph et al. 2022 (ST-MoE), 3.3.
    """
    _added(z_loss.__name__, coefficient * logits.logsumexp(-1).square().sum())
    return logits


def gate_weights(
    logits: Tensor, experts: Tensor, gate: str, normalise: bool, scale: float, drops: bool
) -> Tensor:
    """logits [B, T, X], experts [B, T, P] -> weights [B, T, P]; what was dropped has weight 0.

    normalise: the weights of a token's picks, dropped ones too, sum to `scale`.
    drops: whether some may have been.
    """
    scores = logits.sigmoid() if gate == "sigmoid" else logits.softmax(-1)
    weights = scores.gather(-1, torch.where(experts < 0, ~experts, experts))
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    weights = weights * scale
    return weights.masked_fill(experts < 0, 0.0) if drops else weights


def expert_order(experts: Tensor, drops: bool) -> Tensor:
    """experts [B, T, P] -> the flat places of all kept picks, by expert, then by place [R]."""
    flat = experts.flatten()
    if flat.is_meta:
        return torch.empty_like(flat)
    order = flat.argsort(stable=True)
    return order[int((flat < 0).sum()) :] if drops else order


def expert_counts(experts: Tensor, load: Tensor, count: int) -> Tensor:
    """experts [B, T, P] -> how many kept picks each expert has [X].

    load [2, X]: where emitted programs add up what was chosen, and what of it was dropped.
    """
    return F.one_hot(experts.clamp(min=-1).flatten() + 1, count + 1).sum(0)[1:]


# --------------------------------------------------------------------------------------------------
# Entries


def _register(function, rule, render, *, flops=None, saved=None, **more) -> None:  # type: ignore[no-untyped-def]
    register(
        Entry(
            name=function.__name__,
            function=function,
            rule=rule,
            flops=flops or (lambda node, shapes: float(numel(shapes.operands[0]))),
            saved=saved or (lambda node, shapes: Saved()),
            render=render,
            **more,
        )
    )


def _printed(name: str, *arguments: str, module: str = "runtime.routing") -> Printed:
    return Printed(f"{name}({', '.join(arguments)})", ((module, name),))


def _dims(node: fx.Node, prefix: str) -> tuple[tuple[str], ...]:
    return tuple((f"{prefix}{i}",) for i in range(len(shape_of(node))))


def _chooses(node: fx.Node) -> Rule:
    """Integers out of anything: nothing is split, and no gradient comes back."""
    operands = tensor_operands(node)
    return Rule(
        operands=tuple(_dims(o, "abc"[i]) for i, o in enumerate(operands)),
        result=_dims(node, "r"),
        sizes={},
        integer=frozenset(i for i, o in enumerate(operands) if without_gradient(o)),
        chooses=True,
    )


def _router_rule(node: fx.Node) -> Rule:
    b, t, i = shape_of(node.args[0])  # type: ignore[arg-type]
    return index_rule(
        "b t i, x i -> b t x",
        {"b": b, "t": t, "x": shape_of(node)[2], "i": i},
        whole=frozenset("b"),
        linear=((0,), (1,)),
    )


def _sizes(node: fx.Node) -> dict[str, int]:
    b, t, x = shape_of(node.args[0])  # type: ignore[arg-type]
    return {"b": b, "t": t, "x": x}


def _balance_rule(node: fx.Node) -> Rule:
    return index_rule(
        "b t x, b x -> b t x",
        _sizes(node),
        whole=frozenset("bx"),
        integer=frozenset({1}),
        injects=True,
    )


def _z_rule(node: fx.Node) -> Rule:
    return index_rule("b t x -> b t x", _sizes(node), whole=frozenset("bx"), injects=True)


def _gate_rule(node: fx.Node) -> Rule:
    sizes = _sizes(node) | {"p": shape_of(node)[2]}
    whole, integer = frozenset("bxp"), frozenset({1})
    return index_rule("b t x, b t p -> b t p", sizes, whole=whole, integer=integer)


def _render_router(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    return _printed("router", *args)


def _render_choose(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    top_k, gate, groups, top_groups = node.args[1:5]
    biased = len(node.args) > 5
    # without a bias and groups both gates leave the order of the logits
    options = [f"top_k={top_k}"]
    if biased or groups != 1:
        options.append(f"gate={gate!r}")
    if groups != 1:
        options += [f"groups={groups}", f"top_groups={top_groups}"]
    if biased:
        options.append(f"bias_X={args[5]}")
    return _printed("choose_experts", args[0], *options)


def _render_drop(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    return _printed("drop_over_capacity", args[0], f"capacity={node.args[2]}")


def _render_load(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    return _printed("sequence_load", args[0], f"experts={node.args[1]}")


def _alike(placed: Localised) -> list[str]:
    """Which ranks have the same loss, if several do: each counts a share in the log."""
    several = placed.ranks > 1 and placed.factor is None
    return [f"alike={placed.axis}"] if several else []


def _render_balance(node: fx.Node, args: Sequence[str], placed: Localised) -> Printed:
    _logits, load, coefficient, gate, top_k, tokens = node.args
    experts = shape_of(load)[1]  # type: ignore[arg-type]
    scale = f"{coefficient!r} * {experts} / ({top_k} * {tokens})"
    name = "with_balance_loss"
    options = [f"coefficient={scale}", f"gate={gate!r}", *_alike(placed)]
    return _printed(name, args[0], args[1], *options)


def _render_z(node: fx.Node, args: Sequence[str], placed: Localised) -> Printed:
    options = [f"coefficient={node.args[1]!r}", *_alike(placed)]
    return _printed("with_z_loss", args[0], *options)


def _render_gate(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    gate, normalise, scale, drops = node.args[2:6]
    options = [f"gate={gate!r}", f"normalise={normalise}"]
    if scale != 1.0:
        options.append(f"scale={scale!r}")
    if drops:
        options.append("drops=True")
    return _printed("gate_weights", args[0], args[1], *options)


def _render_order(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    return _printed("expert_order", args[0], f"drops={node.args[1]}")


def _render_counts(node: fx.Node, args: Sequence[str], _: Localised) -> Printed:
    return _printed("expert_counts", args[0], args[1])


def _balance_kept(node: fx.Node, shapes: Shapes) -> Saved:
    """In float32: the scores, of sigmoids their sums too, and the load."""
    scores, rows = numel(shapes.operands[0]), numel(shapes.operands[0][:-1])
    sums = rows if node.args[3] == "sigmoid" else 0
    return Saved(extra_bytes=4 * (scores + sums + numel(shapes.operands[1])))


def _z_kept(node: fx.Node, shapes: Shapes) -> Saved:
    return Saved(operands=(0,), extra_bytes=4 * numel(shapes.operands[0][:-1]))


def _weights_kept(node: fx.Node, shapes: Shapes) -> Saved:
    """The logits; in float32 and of the picks alone what the gate gives, unless it is the result, a
    sum a row, and which were dropped."""
    gate, normalise, scale, drops = node.args[2:6]
    summed = (gate == "sigmoid") == normalise
    changed = scale != 1.0 or drops or (gate == "sigmoid" and normalise)
    picks, rows = numel(shapes.result), numel(shapes.result[:-1])
    kept = (4 * picks if changed else 0) + (4 * rows if summed else 0) + (picks if drops else 0)
    return Saved(operands=(0,), extra_bytes=kept)


_register(
    router,
    _router_rule,
    _render_router,
    flops=lambda node, shapes: 2.0 * numel(shapes.result) * shapes.operands[0][-1],
    saved=lambda node, shapes: Saved(operands=(0, 1)),
    contraction=True,
)
_register(choose_experts, _chooses, _render_choose)
_register(drop_over_capacity, _chooses, _render_drop)
_register(sequence_load, _chooses, _render_load)
_register(balance_loss, _balance_rule, _render_balance, saved=_balance_kept, passes=True)
_register(z_loss, _z_rule, _render_z, saved=_z_kept, passes=True)
_register(gate_weights, _gate_rule, _render_gate, saved=_weights_kept)
_register(expert_order, _chooses, _render_order)
_register(expert_counts, _chooses, _render_counts)


def capacity_of(factor: float, tokens: int, top_k: int, experts: int) -> int:
    """Rows of an expert in one sequence: `factor` times its equal share, rounded up."""
    return math.ceil(factor * tokens * top_k / experts)
