"""A unit's backward, moment by moment: gradients of weights come, what operators kept goes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

Moments = tuple[tuple[int, int], ...]
"""Of a unit's backward: (elements whose gradients have come, bytes beside what was kept as it
began), the moments that no later one exceeds."""


def fullest_of(moments: Moments, coming: int) -> int:
    """`coming`: bytes of each element whose gradient comes meanwhile and stays."""
    return max((coming * elements + size for elements, size in moments), default=0)


def worst_of(moments: list[tuple[int, int]]) -> Moments:
    """`moments`: in order, elements never fewer."""
    out: list[tuple[int, int]] = []
    for elements, size in reversed(moments):
        if not out or size > out[-1][1]:
            if out and elements == out[-1][0]:
                out.pop()
            out.append((elements, size))
    return tuple(reversed(out))


@dataclass
class Waiting:
    """Gradients of values that have come, until the operator that made the value goes backward."""

    of: dict[Hashable, int] = field(default_factory=dict)
    """By value, whose gradient it is: several may have the same one."""
    sizes: list[int] = field(default_factory=list)

    def come(self, value: Hashable, size: int) -> None:
        self.of[value] = len(self.sizes)
        self.sizes.append(size)

    @property
    def total(self) -> int:
        return sum(self.sizes[g] for g in set(self.of.values()))

    def through(self, result: Hashable, operands: Mapping[Hashable, int], *, hands_on: bool) -> int:
        """An operator goes backward: bytes of gradients beside its result's and its operands' own.
        `hands_on`: its result's is theirs."""
        own = self.of.pop(result, None)
        beside = sum(self.sizes[g] for g in set(self.of.values()) - {own})
        for operand, size in operands.items():
            if hands_on and own is not None and operand not in self.of:
                self.of[operand] = own
            else:
                self.come(operand, size)
        return beside
