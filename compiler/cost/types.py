"""Bytes of an element of each kind of value, by precision: the table of docs/cost.md."""

from __future__ import annotations

from dataclasses import dataclass

from llmspec.compiler.errors import Unsupported
from llmspec.dsl.program import Call, Train


@dataclass(frozen=True, slots=True, kw_only=True)
class Types:
    """matrix: the device's rate that matrix products run at. The rest: bytes of one element.

    weights: as stored; compute: activations, and weights where they are multiplied; gradients: as
    accumulated and reduced; moments: all that the optimizer keeps.
    """

    matrix: str
    compute: int
    weights: int = 4
    gradients: int = 4
    moments: int = 8

    @property
    def mixed(self) -> bool:
        return self.compute != self.weights

    @property
    def bytes_per_parameter(self) -> int:
        return self.weights + self.gradients + self.moments


def moments_bytes(optimizer: Call) -> int:
    match optimizer.name:
        case "adamw":
            return 8
        case "sgd":
            return 4 if dict(optimizer.options).get("momentum") else 0
    raise Unsupported(f"the memory of optimizer `{optimizer.name}`", optimizer.span)


def types_of(train: Train) -> Types:
    moments = moments_bytes(train.optimizer)
    options = dict(train.precision.options)
    match train.precision.name:
        case "bf16":
            return Types(matrix="bf16", compute=2, moments=moments)
        case "fp32":
            fast = options.get("tf32") in (True, "on")
            return Types(matrix="tf32" if fast else "fp32", compute=4, moments=moments)
    raise Unsupported(f"precision `{train.precision.name}`", train.precision.span)
