"""The two-level graph of a model: an outer list of block instances, an inner FX graph per distinct
block.

Inner graphs hold operators of the dialect (`compiler/ops`) on whole tensors of one micro-batch.
What a
node carries in `meta`:

    shape    the result's shape, B × T being one micro-batch
    dims     one letter per dimension, for names of variables ("BTD"); "" when nobody knows
    label    the name a reader would give the value ("q")
    scope    the path of operator instances it belongs to: ("attention",)
    span     where the spec (or the user's Python file) says so
    integer  whether it holds whole numbers: ids, choices, counts

and a `get_attr` node besides: `parameter`, a Parameter.

A value whose dims begin with R has rows first, one for each expert that a token is sent to. Their
number is known only while a program runs, and the shape's is the one that all tokens together make.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from llmspec.dsl.program import Span

INTEGER_INPUTS = ("tokens", "targets", "samples")
"""Inputs of units that are token ids or counters: no gradient, whole on every tensor rank."""


# --------------------------------------------------------------------------------------------------
# Initial values


@dataclass(frozen=True, slots=True)
class Init:
    """How a parameter starts: `kind` of normal (a mean, b standard deviation), uniform (from a to
    b),
    constant (a). `zero_rows`: rows of the first dimension that start at zero. `additions`: b is
    divided by the root of so many, those into one sum that the parameter has a part in.
    """

    kind: str
    a: float = 0.0
    b: float = 0.0
    zero_rows: tuple[int, ...] = ()
    additions: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """What makes a parameter a state that is no weight: no gradient, no optimizer, never split.

    kept: part of checkpoints. integer: it counts. rate: how far each step moves it. what: it is,
    for people.
    """

    kept: bool = True
    integer: bool = False
    rate: float | None = None
    what: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A weight of a unit, or a buffer.

    path: within the unit (`attention.q`); the full name is the instance's prefix and this.
    shape: as stored and checkpointed, a stack of fused weights apart: [3, O, I].
    dims: one letter per dimension.
    decay: whether weight decay applies.
    tied: the full name of the parameter that this one is, when another unit owns it.
    source_shape: the shape in the model it came from, when that differs (a fused weight as [3·O,
        I]).
    expert_ranks: over how many ranks its first dimension, experts, is split.
    picks: of a stack of experts' weights [X, …], how many of them one token uses.
    """

    path: str
    shape: tuple[int, ...]
    dims: str
    init: Init
    decay: bool = True
    tied: str | None = None
    source_shape: tuple[int, ...] | None = None
    expert_ranks: int = 1
    picks: int | None = None
    buffer: Buffer | None = None

    @property
    def held_shape(self) -> tuple[int, ...]:
        """Of what one expert rank has."""
        return (self.shape[0] // self.expert_ranks, *self.shape[1:]) if self.shape else ()

    @property
    def active_elements(self) -> int:
        """Of those that one token runs through."""
        whole = math.prod(self.shape)
        return whole if self.picks is None else whole * self.picks // self.shape[0]


# --------------------------------------------------------------------------------------------------
# Units and the whole


@dataclass(eq=False)
class Unit:
    """One distinct block, with its inner graph. Passes replace the graph; nothing else changes it.

    name: what a reader calls it (`layer`, `first`, `last`).
    inputs: names of the placeholders, in order; the first is the value that flows through.
    """

    name: str
    graph: fx.Graph
    inputs: tuple[str, ...]
    span: Span | None = None
    parameters: dict[str, Parameter] = field(default_factory=dict)

    def nodes(self) -> Iterator[fx.Node]:
        return iter(self.graph.nodes)

    def calls(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "call_function"]

    def weights(self) -> dict[str, Parameter]:
        """The parameters that are no buffers, by path."""
        return {path: p for path, p in self.parameters.items() if p.buffer is None}

    def output(self) -> fx.Node:
        return next(iter(reversed(self.graph.nodes)))

    def result(self) -> fx.Node:
        return self.output().args[0]  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One use of a unit. `prefix`: of its parameters' full names ("layer.3", or "")."""

    unit: str
    prefix: str

    def full_name(self, path: str) -> str:
        return f"{self.prefix}.{path}" if self.prefix else path


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelGraph:
    """A chain of instances: each takes the one before's result as its first input.

    The first takes `tokens`; the last returns the summed loss. `targets` and `samples` go to
    whoever
    names them among its inputs.
    replicated: what could not be raised and runs whole on every tensor rank: (where, what), for
        people.
    """

    name: str
    units: dict[str, Unit]
    instances: tuple[Instance, ...]
    sequences: int
    tokens: int
    vocab: int
    dropout: bool
    replicated: tuple[tuple[str, str], ...] = ()

    def parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(full name, parameter) of each weight that is owned, tied uses left out, in the chain's
        order.
        """
        for instance in self.instances:
            for parameter in self.units[instance.unit].weights().values():
                if parameter.tied is None:
                    yield instance.full_name(parameter.path), parameter

    def with_units(self, units: dict[str, Unit]) -> ModelGraph:
        return replace(self, units=units)


# --------------------------------------------------------------------------------------------------
# Shapes


def meta_dtype(name: str) -> torch.dtype:
    return torch.int64 if name in INTEGER_INPUTS else torch.float32


def without_gradient(node: fx.Node) -> bool:
    """Ids, counters, choices and buffers: no gradient, the same on every tensor rank."""
    if node.op == "get_attr":
        return node.meta["parameter"].buffer is not None
    return bool(node.meta.get("integer")) or (
        node.op == "placeholder" and str(node.target) in INTEGER_INPUTS
    )


def has_rows(node: fx.Node) -> bool:
    """Whether the first dimension is rows, and the second one no tokens."""
    return bool(node.meta.get("dims", "").startswith("R"))


def on_meta(weight: Parameter) -> torch.Tensor:
    integer = weight.buffer is not None and weight.buffer.integer
    kind = torch.int64 if integer else torch.float32
    return torch.empty(weight.held_shape, dtype=kind, device="meta")


def propagate_shapes(unit: Unit, inputs: dict[str, tuple[int, ...]]) -> None:
    """Fill `meta["shape"]` of every node by running the graph on meta tensors."""
    values: dict[fx.Node, torch.Tensor] = {}
    for node in unit.graph.nodes:
        match node.op:
            case "placeholder":
                name = str(node.target)
                value = torch.empty(inputs[name], dtype=meta_dtype(name), device="meta")
            case "get_attr":
                value = on_meta(node.meta["parameter"])
            case "call_function":
                args = fx.map_arg(node.args, values.__getitem__)
                value = node.target(*args, **node.kwargs)  # type: ignore[operator]
            case _:
                continue
        values[node] = value
        node.meta["shape"] = tuple(value.shape)
        node.meta["integer"] = not value.is_floating_point()


def input_shapes(unit: Unit, sequences: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a unit's inputs for B × T; flowing values keep their last dimensions."""
    shapes: dict[str, tuple[int, ...]] = {}
    for node in unit.graph.nodes:
        if node.op != "placeholder":
            continue
        name = str(node.target)
        known = node.meta.get("shape", ())
        if name == "samples":
            shapes[name] = (sequences,)
        else:
            shapes[name] = (sequences, tokens, *known[2:])
    return shapes
