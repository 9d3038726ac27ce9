"""Every operator under every placement that its rule allows: the printed call, run on each rank's
part, gives the whole operator's result and gradients, put together as the states say."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from llmspec.compiler import ops
from llmspec.compiler.build.builder import UnitBuilder
from llmspec.compiler.graph import INTEGER_INPUTS, Init, Unit
from llmspec.compiler.ops.exchange import (
    exchange_counts,
    own_counts,
    return_to_tokens,
    send_to_experts,
)
from llmspec.compiler.ops.opaque import Call, Slot
from llmspec.compiler.ops.registry import (
    BY_NAME,
    Choice,
    Localised,
    choices,
    entry_of,
    register,
    tensor_operands,
)
from llmspec.compiler.passes.shard import shard_unit
from llmspec.compiler.placement import Kind, State, local_shape
from llmspec.compiler.plan import UnitPlacement

assert ops, "importing the package fills the registry"

B, T, H, K, E, D, V = 2, 4, 4, 2, 6, 8, 10
RANKS = 2
AXIS_NEEDED = ("vocabulary_parallel",)
"""Functions that talk to the other ranks: tests/runtime/test_loss.py runs them on processes."""


EXCHANGED = (exchange_counts, own_counts, send_to_experts, return_to_tokens)


class _Exchange:
    def __init__(self, counts: Tensor):
        self.counts_x = counts.sum(0)


@dataclass(frozen=True)
class Sample:
    """Arguments of one call: shapes of tensors, names of integer inputs, plain values."""

    name: str
    arguments: tuple[Any, ...]
    words: str = ""


class Shape(tuple[int, ...]):
    """A tensor argument."""


def of(*sizes: int) -> Shape:
    return Shape(sizes)


@dataclass(frozen=True)
class Whole:
    """An operand of integers."""

    name: str
    value: Tensor


X, P, R = 4, 2, B * T * 2
PICKS = torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0], [3, 1], [0, 3], [1, 3], [3, 0]]).view(B, T, P)
EXPERTS = Whole("experts", PICKS)
DROPPED = Whole("experts", torch.where(torch.arange(R).view(B, T, P) % 5 == 0, ~PICKS, PICKS))
ORDER = Whole("order", PICKS.flatten().argsort(stable=True))
COUNTS = Whole("counts", torch.bincount(PICKS.flatten(), minlength=X))
EXCHANGE = Whole("exchange", COUNTS.value.unsqueeze(0))
LOAD = Whole("load", torch.zeros(2, X, dtype=torch.int64))
LOGITS = of(B, T, X)
CAT = Call(target="cat.default", args=((Slot(0), Slot(1)), -1))
WIDE = of(B, T, D)
QUERY, KEY = of(B, T, H, E), of(B, T, K, E)
WEIGHTS = of(B, H, T, T)

SAMPLES = (
    *(Sample(n, (WIDE, WIDE)) for n in ("add", "subtract", "multiply", "divide")),
    *(Sample(n, (WIDE, of(D)), " row") for n in ("add", "multiply")),
    *(Sample(n, (WIDE, 0.5), " number") for n in ("add", "multiply")),
    *(Sample(n, (WIDE,)) for n in ("gelu", "gelu_tanh", "relu", "silu", "tanh", "sigmoid")),
    Sample("linear", (WIDE, of(6, D))),
    Sample("linear", (WIDE, of(3, 6, D)), " stack"),
    Sample("projection", (WIDE, of(D, 6))),
    Sample("projection", (WIDE, of(D, 3, 6)), " stack"),
    Sample("rms_norm", (WIDE, of(D), 1e-5)),
    Sample("layer_norm", (WIDE, of(D), of(D), 1e-5)),
    Sample("layer_norm_no_bias", (WIDE, of(D), 1e-5)),
    Sample("embedding", ("tokens", of(V, D))),
    Sample("positions", ("tokens", of(T + 2, D))),
    Sample("cross_entropy", (of(B, T, V), "targets")),
    Sample("linear_cross_entropy", (WIDE, of(V, D), "targets", 3)),
    Sample("dropout", (WIDE, "samples", 0.5, 1)),
    Sample("attention", (QUERY, KEY, KEY, True, None, False)),
    Sample("attention", (QUERY, KEY, KEY, True, 2, True), " explicit"),
    Sample("attention", (QUERY, KEY, KEY, False, None, False), " both ways"),
    Sample("attention", (QUERY, KEY, of(B, T, K, 5), True, None, False), " other values"),
    Sample("rotary", (QUERY, 10000.0)),
    Sample("join", (QUERY, of(B, T, H, 3))),
    Sample("join", (QUERY, of(B, T, 1, 3)), " for all heads"),
    Sample("scores", (QUERY, KEY)),
    Sample("masked_softmax", (WEIGHTS, True, None)),
    Sample("masked_softmax", (WEIGHTS, False, 2), " window"),
    Sample("mixture", (WEIGHTS, KEY)),
    Sample("turn_halves", (QUERY,)),
    Sample("turn_pairs", (QUERY,)),
    Sample("unflatten", (WIDE, (4, 2))),
    Sample("flatten", (QUERY, 2)),
    Sample("select", (of(B, T, 3, D), -2, 1)),
    Sample("opaque", (WIDE, WIDE, CAT)),
    Sample("router", (WIDE, of(X, D))),
    Sample("choose_experts", (LOGITS, 2, "softmax", 1, 1)),
    Sample("choose_experts", (LOGITS, 2, "sigmoid", 2, 1, of(X)), " groups"),
    Sample("drop_over_capacity", (EXPERTS, X, 2)),
    Sample("sequence_load", (DROPPED, X)),
    Sample(
        "balance_loss",
        (LOGITS, Whole("load", torch.tensor([[3, 1, 0, 4]] * B)), 0.1, "softmax", 2, T),
    ),
    Sample(
        "balance_loss",
        (LOGITS, Whole("load", torch.tensor([[3, 1, 0, 4]] * B)), 0.1, "sigmoid", 2, T),
        " sigmoid",
    ),
    Sample("z_loss", (LOGITS, 0.1)),
    Sample("gate_weights", (LOGITS, EXPERTS, "softmax", True, 1.0, False)),
    Sample("gate_weights", (LOGITS, DROPPED, "softmax", False, 2.0, True), " scores"),
    Sample("gate_weights", (LOGITS, DROPPED, "sigmoid", True, 2.5, True), " sigmoid"),
    Sample("expert_order", (EXPERTS, False)),
    Sample("expert_order", (DROPPED, True), " drops"),
    Sample("expert_counts", (DROPPED, LOAD, X)),
    Sample("dispatch", (WIDE, ORDER, P)),
    Sample("grouped_linear", (of(R, D), of(X, 6, D), COUNTS)),
    Sample("grouped_bias", (of(R, 6), of(X, 6), COUNTS)),
    Sample("exchange_counts", (COUNTS, 1)),
    Sample("own_counts", (EXCHANGE,)),
    Sample("send_to_experts", (of(R, D), EXCHANGE)),
    Sample("return_to_tokens", (of(R, D), EXCHANGE)),
    Sample("combine", (of(R, D), of(B, T, P), ORDER)),
)


def unit_of(sample: Sample) -> Unit:
    """One call, its tensors as parameters so that each can be in a state of its own."""
    b = UnitBuilder("unit")
    arguments: list[Any] = []
    for i, value in enumerate(sample.arguments):
        if isinstance(value, Shape):
            arguments.append(b.parameter(f"w{i}", tuple(value), "", Init("constant")))
        elif isinstance(value, Whole):
            arguments.append(b.input(value.name, tuple(value.value.shape), "", torch.int64))
        elif value in INTEGER_INPUTS and isinstance(value, str):
            arguments.append(b.input(value, (B,) if value == "samples" else (B, T), ""))
        else:
            arguments.append(value)
    function = BY_NAME[sample.name].function
    return b.finish(b.call(function, *arguments, label="result", dims=""))


def call_of(unit: Unit) -> fx.Node:
    return next(n for n in unit.calls() if "move" not in n.meta)


def legal(sample: Sample) -> list[Choice]:
    """A scalar is the loss, which ends the chain whole: never in shadow."""
    node = call_of(unit_of(sample))
    found = choices(entry_of(node).rule(node), RANKS)
    return [c for c in found if node.meta["shape"] or c.result.kind is not Kind.SHADOW]


CASES = [pytest.param(s, c, id=f"{s.name}{s.words}-{c.name}") for s in SAMPLES for c in legal(s)]


def lowered(unit: Unit, choice: Choice) -> fx.Node:
    """The call on one rank's shapes."""
    node = call_of(unit)
    named = zip(tensor_operands(node), choice.operands, strict=True)
    placement = UnitPlacement(
        boundary_out=str(choice.result),
        nodes={node.name: choice.name},
        parameters={str(n.target): str(s) for n, s in named if n.op == "get_attr"},
    )
    return call_of(shard_unit(unit, placement, RANKS))


def run_printed(node: fx.Node, tensors: Sequence[Tensor], rank: int) -> Tensor:
    names = iter(f"x{i}" for i in range(len(tensors)))
    args = [next(names) if isinstance(a, fx.Node) else repr(a) for a in node.args]
    if isinstance(node.args[-1], Call):
        args.pop()
    printed = entry_of(node).render(node, args, node.meta.get("localised", Localised()))
    if any(name.startswith(AXIS_NEEDED) for _, name in printed.imports):
        pytest.skip("talks to other ranks")
    known: dict[str, Any] = {f"x{i}": t for i, t in enumerate(tensors)}
    for module, name in printed.imports:
        known[name] = getattr(importlib.import_module(f"llmspec.{module}"), name)
    if node.target in EXCHANGED:  # among one expert rank; several: tests/runtime
        known[node.target.__name__] = node.target
    if node.target is own_counts:
        known["x0"] = _Exchange(tensors[0])
    axis = SimpleNamespace(rank=rank, size=RANKS)
    known["self"] = SimpleNamespace(tensor=axis, expert=1, first_dropout=0, training=True)
    return eval(printed.text, known | {"torch": torch, "F": F, "SEED": 3})


def values_of(unit: Unit, sample: Sample, seed: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    given = {a.name: a.value for a in sample.arguments if isinstance(a, Whole)}
    values = []
    for node in tensor_operands(call_of(unit)):
        shape = node.meta["shape"]
        if str(node.target) in given:
            values.append(given[str(node.target)].clone())
        elif node.op == "placeholder":
            values.append(torch.randint(0, V, shape, generator=draw))
        else:
            values.append(torch.randn(shape, generator=draw, dtype=torch.float64) + 0.1)
    return values


def parts_of(value: Tensor, state: State, *, gradient: bool, seed: int) -> list[Tensor]:
    """A value, or its gradient, as each rank has it."""
    terms = Kind.SHADOW if gradient else Kind.PARTIAL
    if state.kind is Kind.SPLIT and state.dim is not None:
        return list(value.chunk(RANKS, state.dim))
    if state.kind is terms:
        draw = torch.Generator().manual_seed(seed)
        first = torch.randn(value.shape, generator=draw, dtype=value.dtype)
        return [first, value - first]
    return [value] * RANKS


def put_together(parts: Sequence[Tensor], state: State, *, gradient: bool) -> Tensor:
    terms = Kind.SHADOW if gradient else Kind.PARTIAL
    if state.kind is Kind.SPLIT and state.dim is not None:
        return torch.cat(list(parts), state.dim)
    if state.kind is terms:
        return torch.stack(list(parts)).sum(0)
    for part in parts[1:]:
        torch.testing.assert_close(part, parts[0], rtol=0, atol=0)
    return parts[0]


def with_gradients(
    function: Callable[[list[Tensor]], Tensor], values: Sequence[Tensor], gradient: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    leaves = [v.clone().requires_grad_(v.is_floating_point()) for v in values]
    result = function(leaves)
    if not result.is_floating_point():
        return result, [None] * len(leaves)
    result.backward(gradient)
    return result.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("sample", "choice"), CASES)
def test_placed_equals_whole(sample: Sample, choice: Choice) -> None:
    unit = unit_of(sample)
    node, values = call_of(unit), values_of(unit, sample, seed=1)
    whole = lowered(unit, legal(sample)[0])
    draw = torch.Generator().manual_seed(7)
    gradient = torch.randn(node.meta["shape"], generator=draw, dtype=torch.float64)
    expected, wanted = with_gradients(lambda x: run_printed(whole, x, 0), values, gradient)

    local = lowered(unit, choice)
    pieces = zip(values, choice.operands, strict=True)
    parts = [parts_of(v, s, gradient=False, seed=i) for i, (v, s) in enumerate(pieces)]
    gradients = parts_of(gradient, choice.result, gradient=True, seed=99)
    results, found = [], []
    for rank in range(RANKS):
        own = [p[rank] for p in parts]
        result, grads = with_gradients(
            lambda x, rank=rank: run_printed(local, x, rank), own, gradients[rank]
        )
        rows = sample.name == "expert_order"  # as many as were kept
        assert rows or tuple(result.shape) == local_shape(node.meta["shape"], choice.result, RANKS)
        results.append(result)
        found.append(grads)
    torch.testing.assert_close(put_together(results, choice.result, gradient=False), expected)
    for i, state in enumerate(choice.operands):
        if wanted[i] is not None:
            mine = [g[i] if g[i] is not None else torch.zeros_like(parts[i][0]) for g in found]
            torch.testing.assert_close(put_together(mine, state, gradient=True), wanted[i])


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.name + s.words)
def test_printed_means_what_the_entry_says(sample: Sample) -> None:
    """The text of the whole operator against its function, which the reference runs."""
    unit = unit_of(sample)
    values = values_of(unit, sample, seed=2)
    given = iter(values)
    node = call_of(unit)
    arguments = [next(given) if isinstance(a, fx.Node) else a for a in node.args]
    printed = run_printed(lowered(unit, legal(sample)[0]), values, 0)
    if sample.name == "dropout":  # off without a generator; its masks: tests/runtime/test_random.py
        kept = printed != 0
        torch.testing.assert_close(printed[kept], 2 * values[0][kept])
        assert 0.2 < kept.double().mean() < 0.8
        return
    torch.testing.assert_close(printed, BY_NAME[sample.name].function(*arguments))


ON_CONTEXT_RANKS = {
    "ring_attention",
    "gather_attention",
    "ulysses_attention",
    "gather_tokens",
    "own_tokens",
    "context_rotary",
    "context_sequence_load",
    "context_positions",
    "context_dropout",
    "context_masked_softmax",
}
"""Of one context rank, and nothing without the others: tests/compiler/verify/test_context.py
runs them on processes, over tensor ranks too."""


def test_every_operator_has_a_sample() -> None:
    assert {s.name for s in SAMPLES} == set(BY_NAME) - ON_CONTEXT_RANKS


def test_splits_are_tried() -> None:
    """The cases are not only whole ones: every operator can be split, but the opaque one and those
    that choose experts."""
    split = {s.name for s in SAMPLES for c in legal(s) if c.factor}
    nodes = {s.name: call_of(unit_of(s)) for s in SAMPLES}
    choosing = {name for name, node in nodes.items() if entry_of(node).rule(node).chooses}
    assert split == set(BY_NAME) - choosing - ON_CONTEXT_RANKS - {"opaque"}
    assert len(choosing) == 7


@pytest.mark.parametrize("part", ("function", "rule", "flops", "saved", "render"))
def test_an_incomplete_entry_is_refused(part: str) -> None:
    entry = replace(BY_NAME["add"], name="new", **{part: None})
    with pytest.raises(ValueError, match=part):
        register(entry)
    assert "new" not in BY_NAME
