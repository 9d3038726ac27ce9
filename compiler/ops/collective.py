"""The conversions between placements as nodes of a lowered graph, one function per runtime
function.

They are never run here: the emitted program calls `runtime.collectives`. A node's args are the
    value and
the dimensions that the runtime function takes; its meta holds the `Move`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

from torch import fx

from llmspec.compiler.errors import InternalError
from llmspec.compiler.placement import Collective, Conversion, Kind, State


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One conversion: what it sends, forward and backward, on one axis.

    whole_shape: of the value before any split; elements_local: of one rank's slice.
    """

    axis: str
    conversion: Conversion
    have: State
    want: State
    whole_shape: tuple[int, ...]
    ranks: int


def _not_runnable(*_: Any) -> NoReturn:
    raise InternalError("a collective is emitted, never run inside the compiler")


def all_reduce(*args: Any) -> Any:
    _not_runnable(args)


def all_reduce_both(*args: Any) -> Any:
    _not_runnable(args)


def all_gather(*args: Any) -> Any:
    _not_runnable(args)


def all_gather_replicated(*args: Any) -> Any:
    _not_runnable(args)


def reduce_scatter(*args: Any) -> Any:
    _not_runnable(args)


def split(*args: Any) -> Any:
    _not_runnable(args)


def narrow(*args: Any) -> Any:
    _not_runnable(args)


def sum_gradient(*args: Any) -> Any:
    _not_runnable(args)


def all_to_all(*args: Any) -> Any:
    _not_runnable(args)


FUNCTIONS = {
    f.__name__: f
    for f in (
        all_reduce,
        all_reduce_both,
        all_gather,
        all_gather_replicated,
        reduce_scatter,
        split,
        narrow,
        sum_gradient,
        all_to_all,
    )
}


def arguments(conversion: Conversion, have: State, want: State) -> tuple[int, ...]:
    """The dimensions that the runtime function takes after the value."""
    match have.kind, want.kind:
        case Kind.SPLIT, Kind.SPLIT:
            return (want.dim, have.dim)  # type: ignore[return-value]
        case Kind.SPLIT, _:
            return (have.dim,)  # type: ignore[return-value]
        case _, Kind.SPLIT:
            return (want.dim,)  # type: ignore[return-value]
        case _:
            return ()


def is_collective(node: fx.Node) -> bool:
    return "move" in node.meta


def sends(node: fx.Node) -> bool:
    """Whether bytes cross a link, in either direction of the pass."""
    move: Move = node.meta["move"]
    quiet = (Collective.NONE, Collective.SLICE)
    return move.conversion.forward not in quiet or move.conversion.backward not in quiet
