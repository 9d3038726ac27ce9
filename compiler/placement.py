"""Where a value lives on one mesh axis, forward and backward, and what it costs to move it.

A value on one axis is in one of four states. Two of them say that forward and backward differ:

    state        forward value            gradient
    Split(d)     each rank a slice of d   each rank the same slice
    WHOLE        equal on all ranks       equal on all ranks
    SHADOW       equal on all ranks       each rank a term of a sum
    PARTIAL      each rank a term         equal on all ranks

SHADOW and PARTIAL are each other's transposes. Every collective of a lowered program, forward and
backward, is a conversion between two states; CONVERSIONS is the whole table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Kind(StrEnum):
    SPLIT = "split"
    WHOLE = "whole"
    SHADOW = "shadow"
    PARTIAL = "partial"


@dataclass(frozen=True, slots=True)
class State:
    kind: Kind
    dim: int | None = None
    """The split dimension, counted from 0; None for the other kinds."""

    def __str__(self) -> str:
        return f"split {self.dim}" if self.kind is Kind.SPLIT else str(self.kind)


WHOLE = State(Kind.WHOLE)
SHADOW = State(Kind.SHADOW)
PARTIAL = State(Kind.PARTIAL)


def Split(dim: int) -> State:
    return State(Kind.SPLIT, dim)


def parse_state(text: str) -> State:
    kind, _, dim = text.partition(" ")
    return State(Kind(kind), int(dim) if dim else None)


class Collective(StrEnum):
    """What moves bytes: `send` one message to a neighbour; `slice` is local."""

    NONE = "none"
    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    SEND = "send"
    SLICE = "slice"


class Conversion(NamedTuple):
    """function: the runtime's name for it. forward, backward: what each direction sends."""

    function: str
    forward: Collective
    backward: Collective


C = Collective
CONVERSIONS: dict[tuple[Kind, Kind], Conversion] = {
    (Kind.PARTIAL, Kind.WHOLE): Conversion("all_reduce", C.ALL_REDUCE, C.NONE),
    (Kind.PARTIAL, Kind.SHADOW): Conversion("all_reduce_both", C.ALL_REDUCE, C.ALL_REDUCE),
    (Kind.PARTIAL, Kind.SPLIT): Conversion("reduce_scatter", C.REDUCE_SCATTER, C.ALL_GATHER),
    (Kind.SPLIT, Kind.SHADOW): Conversion("all_gather", C.ALL_GATHER, C.REDUCE_SCATTER),
    (Kind.SPLIT, Kind.WHOLE): Conversion("all_gather_replicated", C.ALL_GATHER, C.SLICE),
    (Kind.SPLIT, Kind.SPLIT): Conversion("all_to_all", C.ALL_TO_ALL, C.ALL_TO_ALL),
    (Kind.WHOLE, Kind.SHADOW): Conversion("sum_gradient", C.NONE, C.ALL_REDUCE),
    (Kind.WHOLE, Kind.SPLIT): Conversion("split", C.SLICE, C.ALL_GATHER),
    (Kind.SHADOW, Kind.SPLIT): Conversion("narrow", C.SLICE, C.NONE),
}
"""Pairs not listed do not convert: a partial sum is not made out of a whole for gain, and a
shadow's gradient would have to be divided among ranks."""

IDENTITY = Conversion("", C.NONE, C.NONE)


def conversion(have: State, want: State) -> Conversion | None:
    """The conversion from `have` to `want`; IDENTITY when they agree; None when there is none."""
    if have == want:
        return IDENTITY
    return CONVERSIONS.get((have.kind, want.kind))


def local_shape(shape: tuple[int, ...], state: State, ranks: int) -> tuple[int, ...]:
    """The shape on the fullest rank: the first chunk of `ceil(size / ranks)`."""
    if state.kind is not Kind.SPLIT or state.dim is None:
        return shape
    size = -(-shape[state.dim] // ranks)
    return (*shape[: state.dim], size, *shape[state.dim + 1 :])
