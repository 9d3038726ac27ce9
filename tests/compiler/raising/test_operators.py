"""Operators that only raised models use: each placement and each printed call is the operator."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from llmspec.compiler.ops.opaque import Call, Device, Floating, Slot, opaque
from llmspec.compiler.ops.projection import projection
from llmspec.compiler.ops.registry import Choice, Localised, choices, entry_of
from llmspec.compiler.ops.turn import turn_halves, turn_pairs
from llmspec.compiler.ops.weights import masked_softmax, mixture, scores
from llmspec.compiler.placement import Kind, State

RANKS = 2
CAT = Call(target="cat.default", args=((Slot(1), Slot(0)), -1))
COUNT = Call(
    target="arange.default", args=(4,), options=(("dtype", Floating()), ("device", Device()))
)
LARGEST = Call(target="topk.default", args=(Slot(0), 2), index=0)

CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "projection": (projection, ((2, 4, 4), (4, 6))),
    "projection of a stack": (projection, ((2, 4, 4), (4, 3, 6))),
    "scores": (scores, ((2, 3, 4, 2), (2, 3, 4, 2))),
    "grouped scores": (scores, ((2, 3, 8, 2), (2, 3, 4, 2))),
    "softmax": (masked_softmax, ((2, 4, 3, 3), False, None)),
    "causal softmax": (masked_softmax, ((2, 4, 3, 3), True, None)),
    "causal window": (masked_softmax, ((2, 4, 5, 5), True, 2)),
    "window": (masked_softmax, ((2, 4, 5, 5), False, 2)),
    "mixture": (mixture, ((2, 4, 3, 3), (2, 3, 4, 2))),
    "grouped mixture": (mixture, ((2, 8, 3, 3), (2, 3, 4, 2))),
    "halves": (turn_halves, ((2, 4, 4, 6),)),
    "pairs": (turn_pairs, ((2, 4, 4, 6),)),
    "cat": (opaque, ((2, 3), (2, 4), CAT)),
    "count": (opaque, ((2, 3), COUNT)),
    "one of several": (opaque, ((2, 3), LARGEST)),
}


def made(name: str) -> tuple[fx.Node, list[Tensor]]:
    function, args = CASES[name]
    generator = torch.Generator().manual_seed(0)
    graph = fx.Graph()
    tensors: list[Tensor] = []
    nodes: list[Any] = []
    for arg in args:
        if isinstance(arg, tuple):
            node = graph.placeholder(f"x{len(tensors)}")
            node.meta["shape"] = arg
            tensors.append(torch.randn(arg, generator=generator, dtype=torch.float64))
            nodes.append(node)
        else:
            nodes.append(arg)
    node = graph.call_function(function, tuple(nodes))
    node.meta["shape"] = tuple(run(node, tensors).shape)
    return node, tensors


def run(node: fx.Node, tensors: list[Tensor]) -> Tensor:
    given = iter(tensors)
    return node.target(*(next(given) if isinstance(a, fx.Node) else a for a in node.args))  # type: ignore[operator]


def part(x: Tensor, state: State, rank: int) -> Tensor:
    match state.kind:
        case Kind.SPLIT:
            return x.chunk(RANKS, state.dim)[rank]  # type: ignore[arg-type]
        case Kind.PARTIAL:
            return x * (0.25 if rank else 0.75)
        case _:
            return x


def joined(parts: list[Tensor], state: State) -> Tensor:
    match state.kind:
        case Kind.SPLIT:
            return torch.cat(parts, state.dim)  # type: ignore[arg-type]
        case Kind.PARTIAL:
            return parts[0] + parts[1]
        case _:
            return parts[0]


def holds(node: fx.Node, tensors: list[Tensor], choice: Choice) -> bool:
    parts = [
        run(node, [part(x, s, rank) for x, s in zip(tensors, choice.operands, strict=True)])
        for rank in range(RANKS)
    ]
    return torch.allclose(joined(parts, choice.result), run(node, tensors), 1e-12, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_every_placement_is_the_operator(name: str) -> None:
    node, tensors = made(name)
    for choice in choices(entry_of(node).rule(node), RANKS):
        assert holds(node, tensors, choice), choice


@pytest.mark.parametrize("name", CASES)
def test_heads_can_be_split(name: str) -> None:
    node, _ = made(name)
    factors = {c.factor for c in choices(entry_of(node).rule(node), RANKS)} - {None}
    if node.target is opaque:
        assert not factors
    elif node.target is projection:
        assert factors == {"i", "o", "b"}
    else:
        assert len(factors) == (2 if node.target in (turn_halves, turn_pairs) else 1)


@pytest.mark.parametrize("name", CASES)
def test_the_printed_call_is_the_operator(name: str) -> None:
    node, tensors = made(name)
    names = [a.name if isinstance(a, fx.Node) else repr(a) for a in node.args]
    printed = entry_of(node).render(node, names, Localised())
    known = {f"x{i}": x for i, x in enumerate(tensors)}
    for module, function in printed.imports:
        known[function] = getattr(import_module(f"llmspec.{module}"), function)
    assert torch.allclose(eval(printed.text, {"torch": torch, "F": F}, known), run(node, tensors))


def test_types_follow_the_widest_operand() -> None:
    assert opaque(torch.ones(1, dtype=torch.bfloat16), COUNT).dtype == torch.float32
    assert opaque(torch.ones(1, dtype=torch.float64), COUNT).dtype == torch.float64
