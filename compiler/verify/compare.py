"""Compare what the ranks computed with the reference, parameter by parameter."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.reference import Masks, Reference, leaf_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """A gradient differs when ‖a−b‖ > relative · max(‖b‖, floor · ‖all gradients‖)."""

    relative: float
    floor: float
    loss: float


FLOAT64 = Tolerance(relative=1e-9, floor=1e-6, loss=1e-12)
FLOAT32 = Tolerance(relative=1e-5, floor=1e-3, loss=1e-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One quantity, compared. `error` is in units of what is allowed: above 1 it fails."""

    what: str
    error: float

    @property
    def ok(self) -> bool:
        return self.error <= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        return all(d.ok for d in self.differences)

    def failures(self) -> tuple[Difference, ...]:
        return tuple(d for d in self.differences if not d.ok)

    @property
    def worst(self) -> Difference:
        return max(self.differences, key=lambda d: d.error)


def emitted_masks(folder: str, seed: int) -> Masks:
    """The dropout masks of the emitted program, for the reference: its own random.py, whole
    tensors.
    """
    spec = importlib.util.spec_from_file_location(
        "_emitted_random", Path(folder) / "runtime" / "random.py"
    )
    assert spec is not None and spec.loader is not None, "random.py lies in the emitted runtime"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def draw(x: Tensor, p: float, samples: Tensor, operator: int) -> Tensor:
        whole = tuple(x.shape[1:])
        start = (0,) * len(whole)
        return module.dropout(
            x, p, samples, operator=operator, seed=seed, start=start, shape=whole, training=True
        )

    return draw


def whole_norm(gradients: dict[str, Tensor]) -> Tensor:
    return torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt()


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """inner: the losses of layers inside the model, by name, as means over the batch's targets."""

    loss: Tensor
    inner: dict[str, float]
    gradients: dict[str, Tensor]
    norm: Tensor
    clipped: dict[str, Tensor]


def expected(
    graph: ModelGraph,
    parameters: dict[str, Tensor],
    tokens: Tensor,
    *,
    masks: Masks | None,
    clip: float,
) -> Expected:
    """The reference on the whole batch. tokens: [rows, T + 1]; run B rows at a time."""
    leaves = leaf_parameters(parameters)
    reference = Reference(graph, dict(leaves), masks)
    total = torch.zeros((), dtype=next(iter(leaves.values())).dtype)
    inner: dict[str, float] = {}
    targets = tokens.shape[0] * (tokens.shape[1] - 1)
    for start in range(0, tokens.shape[0], graph.sequences):
        rows = tokens[start : start + graph.sequences]
        samples = torch.arange(start, start + len(rows))
        loss = reference.loss(rows[:, :-1], rows[:, 1:], samples) / targets
        inside = [(name, part / targets) for name, part in reference.auxiliary]
        torch.stack([loss, *(part for _, part in inside)]).sum().backward()
        for name, part in inside:
            inner[name] = inner.get(name, 0.0) + float(part.detach())
        total = total + loss.detach()
    gradients = {
        n: (p.grad if p.grad is not None else torch.zeros_like(p)) for n, p in leaves.items()
    }
    norm = whole_norm(gradients)
    scale = (clip / (norm + 1e-6)).clamp(max=1.0)
    clipped = {n: g * scale.to(g.dtype) for n, g in gradients.items()}
    return Expected(
        loss=total.double(), inner=inner, gradients=gradients, norm=norm, clipped=clipped
    )


def merged(ranks: list[dict[str, Any]], key: str) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, value, whether every rank that holds it holds the same)."""
    names = dict.fromkeys(n for r in ranks for n in r[key])
    for name in names:
        held = [r[key][name] for r in ranks if name in r[key]]
        yield name, held[0], all(torch.equal(held[0], other) for other in held[1:])


def total_loss(ranks: list[dict[str, Any]]) -> Tensor:
    """Parts of data ranks add up; tensor ranks hold the same part; stages but the last hold
    zero.
    """
    return sum(r["loss"] for r in ranks if r["coordinates"].get("tensor", 0) == 0)  # type: ignore[return-value]


def compare(ranks: list[dict[str, Any]], want: Expected, tolerance: Tolerance) -> Report:
    out = [
        Difference(
            what="loss",
            error=float((total_loss(ranks) - want.loss).abs() / (want.loss.abs() * tolerance.loss)),
        )
    ]
    for name, mean in want.inner.items():
        # all parts add up, whichever rank has them
        off = abs(sum(float(r["inner"][name]) for r in ranks) - mean)
        out.append(Difference(what=name, error=off / (abs(mean) * tolerance.loss)))
    for rank, values in enumerate(ranks):
        off = float((values["norm"] - want.norm).abs() / (want.norm * tolerance.relative))
        out.append(Difference(what=f"gradient norm on rank {rank}", error=off))
    for key, reference in (("gradients", want.gradients), ("clipped", want.clipped)):
        whole = whole_norm(reference)
        seen = set()
        for name, value, same in merged(ranks, key):
            seen.add(name)
            allowed = tolerance.relative * max(
                float(reference[name].norm()), tolerance.floor * float(whole)
            )
            error = float((value.double() - reference[name].double()).norm()) / allowed
            error = error if error == error else float("inf")
            out.append(Difference(what=f"{key} of {name}", error=error))
            if not same:
                out.append(Difference(what=f"{key} of {name}: replicas differ", error=float("inf")))
        missing = set(reference) - seen
        out += [Difference(what=f"{key} of {n}: missing", error=float("inf")) for n in missing]
    return Report(differences=tuple(out))
