"""What the pins of a plan are checked against, and what several of the rules ask of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from llmspec.dsl.program import AnyModel, Cluster, Constraint, Relation, Span, Train

AXES = ("data", "tensor", "context", "pipeline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """The constraints by key, and what they are checked against (None: has faults of its own)."""

    constraints: tuple[Constraint, ...]
    model: AnyModel | None
    cluster: Cluster | None
    train: Train | None

    def pinned(self, key: str) -> Constraint | None:
        return next(
            (c for c in self.constraints if c.key == key and c.relation == Relation.EQ), None
        )

    def number(self, key: str) -> int | None:
        pin = self.pinned(key)
        value = pin.values[0] if pin else None
        return value if isinstance(value, int) else None

    def spans(self, keys: Iterable[str]) -> list[Span]:
        return [pin.span for key in keys if (pin := self.pinned(key))]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def factors(sizes: dict[str, int]) -> str:
    """`data 8 × microbatch 3 = 24`; a single one as it is."""
    text = " × ".join(f"{key} {n}" for key, n in sizes.items())
    return text if len(sizes) == 1 else f"{text} = {prod(sizes.values())}"


def context_ranks(pins: Pins) -> list[int]:
    """What the pins leave for `context`."""
    pinned = pins.number("context")
    if pinned is not None:
        return [pinned]
    if pins.cluster is None:
        return [1]
    others = prod(n for key in AXES if (n := pins.number(key)) is not None)
    left = {world // others for world in pins.cluster.worlds()}
    return sorted({d for n in left for d in divisors(max(n, 1))})
