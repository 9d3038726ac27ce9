"""Bytes of an element of each kind of value, by precision: the table of docs/cost.md."""

from __future__ import annotations

from dataclasses import dataclass

from llmspec.compiler.errors import Unsupported
from llmspec.compiler.precision import BYTES, Precision, precision_of
from llmspec.dsl.program import Call, Train

RANDOM_BYTES = 200
"""Moved to draw 64 random bits for one element: a dozen passes over 8-byte integers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Types:
    """matrix: the device's rate that matrix products run at. The rest: bytes of one element.

    weights: as stored; compute: activations, and weights where they are multiplied; gradients: as
    accumulated; reduced: as they travel; moments: all that the optimizer keeps; scratch: moved
    by an update beyond reading and writing these.
    """

    matrix: str
    compute: int
    weights: int = 4
    gradients: int = 4
    reduced: int = 4
    moments: int = 8
    scratch: int = 0

    @property
    def mixed(self) -> bool:
        return self.compute != self.weights

    @property
    def bytes_per_parameter(self) -> int:
        return self.weights + self.gradients + self.moments


def moments_of(optimizer: Call) -> int:
    """How many numbers it keeps for each parameter."""
    match optimizer.name:
        case "adamw":
            return 2
        case "sgd":
            return 1 if dict(optimizer.options).get("momentum") else 0
    raise Unsupported(f"the memory of optimizer `{optimizer.name}`", optimizer.span)


def types_of(train: Train) -> Types:
    precision, moments = precision_of(train), moments_of(train.optimizer)
    stored = BYTES[precision.stored]
    return Types(
        matrix=precision.matrix,
        compute=BYTES[precision.compute],
        weights=stored,
        gradients=stored,
        reduced=BYTES[precision.reduced],
        moments=moments * BYTES[precision.moments],
        scratch=_scratch_bytes(precision, moments),
    )


def _scratch_bytes(precision: Precision, moments: int) -> int:
    """The runtime's own updates work on float32 copies: each is written and read, its result
    written and read."""
    if not precision.own_update or (moments == 0 and not precision.stochastic):
        return 0
    short = (precision.stored != "fp32") + moments * (precision.moments != "fp32")
    gradient = 8 * (precision.stored != "fp32")
    return 16 * short + gradient + RANDOM_BYTES * precision.stochastic
