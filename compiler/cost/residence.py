"""How long and in how many pieces the things of a rank live."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from llmspec.compiler.cost.stage import Parts
from llmspec.compiler.cost.types import Types
from llmspec.compiler.schedules import Held


class Turn(NamedTuple):
    """One of a rank's stages goes backward, and what all of them hold then. message_bytes: of
    values of others; kept_bytes: of everything else that is held."""

    held: Held
    message_bytes: int
    kept_bytes: int

    def exceeds(self, other: Turn) -> bool:
        """Whether no bytes of the other one are more, of equal stages."""
        mine, its = self.held, other.held
        return (
            (mine.runs, mine.kind) == (its.runs, its.kind)
            and self.kept_bytes + self.message_bytes >= other.kept_bytes + other.message_bytes
            and all(a >= b for a, b in zip(mine.come, its.come, strict=True))
            and all(a >= b for a, b in zip(mine.early, its.early, strict=True))
            and all(a <= b for a, b in zip(mine.done, its.done, strict=True))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Residence:
    """What decides how long and in how many pieces things live.

    shards, expert_shards: into how many parts ZeRO cuts what all data ranks have, and experts.
    in_flight: micro-batches whose activations a stage holds at once; of several stages or a split
        backward, what is held in units of one micro-batch on all of them.
    sends_on: the stage's output goes to another rank, and is kept for its backward.
    receives: its input comes from one. message_bytes: of values of others that wait to be used.
    split: backwards are in two parts; gradients of the first are whole until the second.
    whole_sums: ZeRO 1 keeps whole sums of gradients even of a single micro-batch.
    standing: gradients have a place all the time, of published software.
    awaited: of its elements, those whose gradients have not begun to come while most is in flight,
        and those of experts among them.
    forwards: the most micro-batches at any moment that wait for their backward; of several stages
        in units of what one has in host memory on all of them.
    turns: of several stages or a split backward, the moments of which any may be the fullest, the
        one that holds most first. sends: whether what each stage makes goes to another rank.
    """

    zero: int
    data: int
    shards: int
    microbatches: int
    in_flight: float
    sends_on: bool
    split: bool = False
    expert_shards: int = 1
    receives: bool = False
    message_bytes: int = 0
    whole_sums: bool = False
    standing: bool = False
    awaited: tuple[int, int] = (0, 0)
    forwards: float = 1.0
    turns: tuple[Turn, ...] = ()
    sends: tuple[bool, ...] = ()

    @property
    def parts(self) -> Parts:
        return Parts(shared=self.shards, experts=self.expert_shards) if self.zero else Parts()

    @property
    def first_is_fullest(self) -> bool:
        """All micro-batches are in flight as the first backward begins, and gradients come as it
        goes, or this rank's parts of them; data ranks that share none have buckets for theirs all
        the time."""
        come = self.sums_each_time and not self.standing
        come |= self.zero == 0 and self.data == 1
        several = self.split or bool(self.turns)
        return come and not several and self.in_flight >= self.microbatches

    @property
    def sums_each_time(self) -> bool:
        """Gradients come in the compute type, and leave as each unit's are summed."""
        single = self.microbatches == 1 and not self.whole_sums
        return self.zero > 1 or (self.zero == 1 and single)

    @property
    def gathers_experts(self) -> bool:
        """Experts that one rank alone has stay as they are whatever the level."""
        return self.zero > 0 and (self.expert_shards > 1 or self.whole_sums)


def cast_bytes(home: Residence, types: Types) -> tuple[int, int]:
    """Of each weight element that autograd keeps as its use casts it: of those that all data ranks
    have, and of experts'."""
    shared = types.compute if types.mixed and home.zero == 0 else 0
    return shared, types.compute if types.mixed and not home.gathers_experts else 0


def sums_bytes(elements: int, of_experts: int, home: Residence, types: Types) -> int:
    """Of gradients that have come. ZeRO 1 keeps whole sums while it has micro-batches to add up, in
    the type of the reduction; the reduced parts come as these go."""
    if home.zero == 0:
        return types.gradients * elements
    if home.sums_each_time:
        return types.gradients * home.parts.largest(elements, of_experts)
    experts = 0 if home.gathers_experts else of_experts
    return types.reduced * (elements - experts) + types.gradients * experts
