"""What flows through a model: token ids, features of some width, or logits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llmspec.dsl.program import BlockUse, Expr, Operator, Span
from llmspec.dsl.values import Value

Use = Operator | BlockUse


class Flow(StrEnum):
    IDS = "token ids"
    FEATURES = "features"
    LOGITS = "logits"
    NUMBER = "a number"


@dataclass(frozen=True, slots=True)
class Shape:
    """width: the size of the last dim; 0 for ids and numbers."""

    flow: Flow
    width: int = 0

    def __str__(self) -> str:
        if self.flow in (Flow.FEATURES, Flow.LOGITS):
            return f"{self.flow} of width {self.width}"
        return str(self.flow)


@dataclass(frozen=True, slots=True)
class Typed:
    expr: Expr
    shape: Shape


@dataclass(frozen=True, slots=True)
class Bound:
    """A constant in scope; `span`: where the user gave its value."""

    value: Value
    span: Span


class Instances:
    """Hands out names that are unique in one body: `rmsnorm`, `rmsnorm_2`, …"""

    def __init__(self, taken: set[str]) -> None:
        self.taken = set(taken)
        self.last: dict[str, int] = {}

    def take(self, natural: str) -> str:
        name, number = natural, self.last.get(natural, 1)
        while name in self.taken:
            number += 1
            name = f"{natural}_{number}"
        self.last[natural] = number
        self.taken.add(name)
        return name
