"""The type of each kind of number of a run: the table of docs/precision.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmspec.compiler.errors import Unsupported
from llmspec.dsl.program import Train

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
TORCH = {"fp32": "torch.float32", "bf16": "torch.bfloat16", "fp16": "torch.float16"}
WORDS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

START, GROW_EVERY = 65536.0, 2000
"""A dynamic loss scale's first value, and the good steps before it doubles: as torch.amp's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScale:
    """What losses are multiplied with before the backward. dynamic: halves and doubles."""

    start: float
    dynamic: bool
    grow_every: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """compute: activations, weights where they are multiplied, what ranks send of them.

    stored: weights, and their gradients as accumulated. reduced: gradients between ranks.
    moments: what the optimizer keeps. stochastic: how updated weights are rounded to `stored`.
    tf32: float32 products at the rate of TF32. loss_scale: None for all but fp16.
    """

    compute: str
    stored: str = "fp32"
    reduced: str = "fp32"
    moments: str = "fp32"
    stochastic: bool = False
    tf32: bool = False
    loss_scale: LossScale | None = None

    @property
    def mixed(self) -> bool:
        """Weights are stored in another type than they are used in."""
        return self.compute != self.stored

    @property
    def matrix(self) -> str:
        """The device's rate that matrix products run at."""
        return "tf32" if self.tf32 else self.compute

    @property
    def own_update(self) -> bool:
        """PyTorch's fused optimizers keep moments in the type of the weights, and round to the
        nearest; all else is the runtime's."""
        return self.stochastic or self.moments != self.stored


def precision_of(train: Train) -> Precision:
    """Errors: Unsupported for a precision without meaning."""
    call = train.precision
    said = dict(call.options)
    match call.name:
        case "fp32":
            return Precision(compute="fp32", tf32=said.get("tf32") == "on")
        case "bf16" | "fp16":
            return Precision(
                compute=call.name,
                stored=call.name if "master" in said and said["master"] is None else "fp32",
                reduced=str(said.get("reduce", "fp32")),
                moments=str(said.get("moments", "fp32")),
                stochastic=said.get("rounding") == "stochastic",
                loss_scale=_loss_scale(said) if call.name == "fp16" else None,
            )
    raise Unsupported(f"precision `{call.name}`", call.span)


def _loss_scale(said: Mapping[str, object]) -> LossScale:
    scale = said.get("scale", "dynamic")
    every = said.get("grow_every") or GROW_EVERY
    assert isinstance(every, int), "a count"
    start = scale if isinstance(scale, float) else START
    return LossScale(start=start, dynamic=scale == "dynamic", grow_every=every)
