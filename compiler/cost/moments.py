"""A unit's backward, moment by moment: gradients of weights come, what operators kept goes."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from llmspec.compiler.undominated import undominated


class At(NamedTuple):
    """One moment of a unit's backward. size_bytes: beside what is kept as it begins.

    came: elements of weights whose gradients have come. cast: of those that autograd keeps as their
    use cast them, negative as those go. turned: of those whose gradient is turned into the type of
    the sum, and there in both. late_bytes: besides, in the first part of a split backward: what
    would have gone and is kept for the second.
    """

    came: int
    cast: int
    turned: int
    size_bytes: int
    late_bytes: int = 0

    def less(self, size_bytes: int) -> At:
        return self._replace(size_bytes=self.size_bytes - size_bytes)

    def total(self, coming: int, cast: int, *, first_part: bool = False) -> int:
        """Bytes. `coming`: of each element whose gradient comes and stays; `cast`: of each that its
        use casts, and whose gradient so comes in another type than that of the sum."""
        turned = cast + (0 if coming else FLOAT32) if cast else 0
        size = self.size_bytes + (self.late_bytes if first_part else 0)
        return coming * self.came + cast * self.cast + turned * self.turned + size


Moments = tuple[At, ...]

FLOAT32 = 4
"""Bytes of an element as sums of short gradients are added to."""


def fullest_of(moments: Moments, coming: int, cast: int, *, first_part: bool = False) -> int:
    """As of one moment; 0 if there is none."""
    return max((at.total(coming, cast, first_part=first_part) for at in moments), default=0)


def worst_of(moments: Iterable[At]) -> Moments:
    """Without those that another one exceeds whatever an element takes."""
    return undominated(moments)


@dataclass
class Waiting:
    """Gradients of values that have come, until the operator that made the value goes backward."""

    of: dict[Hashable, int] = field(default_factory=dict)
    """By value, whose gradient it is: several may have the same one."""
    sizes: list[int] = field(default_factory=list)
    late: set[int] = field(default_factory=set)
    """Those that a second part needs."""

    def come(self, value: Hashable, size: int) -> None:
        self.of[value] = len(self.sizes)
        self.sizes.append(size)

    @property
    def total(self) -> int:
        return sum(self.sizes[g] for g in set(self.of.values()))

    def late_bytes(self) -> int:
        """Of those that only a second part still needs."""
        return sum(self.sizes[g] for g in self.late - set(self.of.values()))

    def through(
        self,
        result: Hashable,
        operands: Mapping[Hashable, int],
        *,
        hands_on: bool,
        late: bool = False,
    ) -> int:
        """An operator goes backward: bytes of gradients beside its result's and its operands' own.
        `hands_on`: its result's is theirs; late: a second part needs its result's."""
        own = self.of.pop(result, None)
        beside = sum(self.sizes[g] for g in set(self.of.values()) - {own})
        for operand, size in operands.items():
            if hands_on and own is not None and operand not in self.of:
                self.of[operand] = own
            else:
                self.come(operand, size)
        if late and own is not None:
            self.late.add(own)
        return beside
