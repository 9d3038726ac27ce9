"""Whether the expert ranks that a plan pins can share a model's experts."""

from __future__ import annotations

from math import gcd, prod

from llmspec.dsl.diagnostics import fault, listing
from llmspec.dsl.parameters import operators_of
from llmspec.dsl.pins import Pins
from llmspec.dsl.program import Constraint, Model, Relation

OTHERS = ("tensor", "context", "pipeline")
"""Axes that leave the rest of a cluster to the data ranks, of which the expert ranks are some."""


def experts_are_shared(pins: Pins) -> None:
    """They divide every mixture's experts, and the data ranks."""
    for constraint in pins.constraints:
        if constraint.key == "expert" and constraint.relation in (Relation.EQ, Relation.IN):
            _divide_experts(pins, constraint)
            _divide_data(pins, constraint)


def _numbers(constraint: Constraint) -> list[int]:
    return [v for v in constraint.values if isinstance(v, int)]


def _divide_experts(pins: Pins, constraint: Constraint) -> None:
    if not isinstance(pins.model, Model):
        return
    counts = [use.option("experts") for use in operators_of(pins.model, "moe")]
    common = gcd(*(n for n in counts if isinstance(n, int)))
    values = _numbers(constraint)
    if not counts and all(v > 1 for v in values):
        raise fault(
            "E0413",
            f"`{pins.model.name}` has no experts for {values[0]} expert ranks to share",
            constraint.span,
            "no block has a `moe`",
            helps=("leave `expert` out",),
        )
    if not counts or any(common % v == 0 for v in values):
        return
    worlds = (common,) if pins.cluster is None else pins.cluster.worlds()
    fits = [d for d in range(1, common + 1) if any(gcd(common, w) % d == 0 for w in worlds)]
    raise fault(
        "E0413",
        f"{values[0]} expert ranks cannot share {_listed(counts)} experts",
        constraint.span,
        "every rank holds the same number of whole experts",
        helps=(_nearest(fits, values[0]),),
    )


def _listed(counts: list) -> str:  # type: ignore[type-arg]
    return " and ".join(str(n) for n in sorted(set(counts)))


def _divide_data(pins: Pins, constraint: Constraint) -> None:
    """The data ranks are pinned, or divide what other pinned axes leave of the cluster."""
    data, values = pins.number("data"), _numbers(constraint)
    keys: tuple[str, ...] = ("data",)
    counts = [data] if data is not None else []
    if data is None and pins.cluster is not None:
        keys = tuple(key for key in OTHERS if pins.number(key))
        others = prod(pins.number(k) or 1 for k in keys)
        counts = [world // others for world in pins.cluster.worlds() if world % others == 0]
    if not counts or any(data % v == 0 for data in counts for v in values):
        return
    data = counts[-1]
    fits = [d for d in range(1, data + 1) if data % d == 0]
    raise fault(
        "E0413",
        f"{values[0]} expert ranks do not divide {data} data ranks",
        constraint.span,
        "a group of them is a part of the data ranks",
        secondary=[(span, "with this") for span in pins.spans(keys)],
        helps=(_nearest(fits, values[0]),),
    )


def _nearest(fits: list[int], wanted: int) -> str:
    near = sorted(sorted(fits, key=lambda d: abs(d - wanted))[:3])
    return "use " + listing(f"expert = {d}" for d in near)
