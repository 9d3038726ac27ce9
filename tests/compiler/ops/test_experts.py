"""Experts: what the emitted program runs against the meaning of its operators, gradients too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llmspec.compiler.ops import experts, routing
from llmspec.compiler.ops.routing import AUXILIARY
from llmspec.runtime import auxiliary
from llmspec.runtime import experts as run_experts
from llmspec.runtime import routing as run_routing

B, T, D, X, P = 3, 8, 6, 8, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def reference(
    x: Tensor, router: Tensor, weight: Tensor, bias: Tensor, gate: str, capacity: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """(the layer's result, the losses inside)."""
    found: list[tuple[str, Tensor]] = []
    token = AUXILIARY.set(found)
    logits = routing.router(x, router)
    chosen = routing.choose_experts(logits, P, gate, 4, 2, bias)
    if capacity is not None:
        chosen = routing.drop_over_capacity(chosen, X, capacity)
    load = routing.sequence_load(chosen, X)
    logits = routing.balance_loss(logits, load, 0.3, gate, P, T)
    logits = routing.z_loss(logits, 0.2)
    weights = routing.gate_weights(
        logits, chosen, gate, gate == "sigmoid", 2.5, capacity is not None
    )
    order = routing.expert_order(chosen, capacity is not None)
    counts = routing.expert_counts(chosen, torch.zeros(2, X), X)
    rows = experts.dispatch(x, order, P)
    rows = experts.grouped_bias(experts.grouped_linear(rows, weight, counts), drawn(X, D), counts)
    AUXILIARY.reset(token)
    return experts.combine(rows, weights, order), dict(found)


def emitted(
    x: Tensor, router: Tensor, weight: Tensor, bias: Tensor, gate: str, capacity: int | None
) -> Tensor:
    logits = run_routing.router(x, router)
    chosen = run_routing.choose_experts(
        logits, top_k=P, gate=gate, groups=4, top_groups=2, bias_X=bias
    )
    if capacity is not None:
        chosen = run_routing.drop_over_capacity(chosen, capacity)
    load = run_routing.sequence_load(chosen, X)
    logits = run_routing.with_balance_loss(logits, load, coefficient=0.3 * X / (P * T), gate=gate)
    logits = run_routing.with_z_loss(logits, coefficient=0.2)
    weights = run_routing.gate_weights(
        logits,
        chosen,
        gate=gate,
        normalise=gate == "sigmoid",
        scale=2.5,
        drops=capacity is not None,
    )
    order = run_routing.expert_order(chosen, capacity is not None)
    counts = run_routing.expert_counts(chosen, torch.zeros(2, X, dtype=torch.int64))
    rows = run_experts.dispatch(x, order, P)
    rows = run_experts.grouped_linear(rows, weight, counts)
    rows = run_experts.grouped_bias(rows, drawn(X, D), counts)
    return run_experts.combine(rows, weights, order)


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_a_layer_and_its_gradients(gate: str, capacity: int | None) -> None:
    values = drawn(B, T, D), drawn(X, D, seed=1), drawn(X, D, D, seed=2)
    bias, gradient, scale = drawn(X, seed=3), drawn(B, T, D, seed=4), 1 / 8
    ours = [v.clone().requires_grad_() for v in values]
    theirs = [v.clone().requires_grad_() for v in values]
    want, inside = reference(*theirs, bias, gate, capacity)
    ((want * gradient).sum() + scale * sum(inside.values())).backward()
    auxiliary.begin(8)
    have = emitted(*ours, bias, gate, capacity)
    (have * gradient).sum().backward()
    counted = auxiliary.parts("balance_loss", "z_loss", "other", device=gradient.device)
    assert counted == pytest.approx({n: v.item() * scale for n, v in inside.items()} | {"other": 0})
    torch.testing.assert_close(have, want)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_the_balance_loss_is_each_sequences_own() -> None:
    """T · coefficient · X · Σ f P of each sequence; the least there is, T · coefficient, when all
    are chosen alike."""
    logits = drawn(B, T, X)
    chosen = routing.choose_experts(logits, P, "softmax", 1, 1)
    found: list[tuple[str, Tensor]] = []
    token = AUXILIARY.set(found)
    load = routing.sequence_load(chosen, X)
    routing.balance_loss(logits, load, 0.5, "softmax", P, T)
    even = torch.zeros(B, T, X, dtype=torch.float64)
    routing.balance_loss(even, torch.full((B, X), P * T // X), 0.5, "softmax", P, T)
    AUXILIARY.reset(token)
    wanted = 0.0
    for b in range(B):
        f = torch.bincount(chosen[b].flatten(), minlength=X) / (P * T)
        wanted += T * 0.5 * X * float((f * logits[b].softmax(-1).mean(0)).sum())
    assert float(found[0][1]) == pytest.approx(wanted)
    assert float(found[1][1]) == pytest.approx(B * T * 0.5)


def test_who_is_dropped() -> None:
    """First picks before second ones, earlier tokens before later ones, in each sequence."""
    chosen = torch.tensor([[[0, 1], [0, 1], [1, 0], [0, 2]], [[2, 0], [2, 0], [2, 0], [0, 2]]])
    kept = torch.tensor([[[0, 1], [0, ~1], [1, ~0], [~0, 2]], [[2, 0], [2, ~0], [~2, ~0], [0, ~2]]])
    for function in (
        lambda e: routing.drop_over_capacity(e, 3, 2),
        lambda e: run_routing.drop_over_capacity(e, 2),
    ):
        assert torch.equal(function(chosen), kept)
    load = torch.zeros(2, 3, dtype=torch.int64)
    assert run_routing.expert_counts(kept, load).tolist() == [4, 2, 3]
    assert load.tolist() == [[8, 3, 5], [4, 1, 2]]


def test_the_router_is_wide() -> None:
    """bfloat16 in, float32 out; gradients in the types they came in."""
    x = drawn(B, T, D).bfloat16().requires_grad_()
    weight = drawn(X, D, seed=1).bfloat16().requires_grad_()
    logits = run_routing.router(x, weight)
    torch.testing.assert_close(logits, x.float() @ weight.float().T, rtol=1e-6, atol=1e-6)
    logits.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.bfloat16
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


def test_grouped_products_keep_what_they_need() -> None:
    """Rows and weight alone, and an expert that nobody chose has a gradient of zeros."""
    rows, weight = drawn(5, D).requires_grad_(), drawn(3, 4, D, seed=1).requires_grad_()
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        out = run_experts.grouped_linear(rows, weight, torch.tensor([2, 0, 3]))
    assert sorted(t.numel() for t in held) == [3, rows.numel(), weight.numel()]
    out.sum().backward()
    assert weight.grad is not None and not weight.grad[1].any() and weight.grad[0].any()
