"""One pipeline stage on one rank: the sum of the units that it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from llmspec.compiler.cost.moments import fullest_of
from llmspec.compiler.cost.recompute import Again
from llmspec.compiler.cost.unit import UnitCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Into how many parts ZeRO cuts weights: those that all data ranks have in common, and those of
    experts, which only ranks with the same experts share."""

    shared: int = 1
    experts: int = 1

    def largest(self, elements: int, of_experts: int) -> int:
        """Of so many elements, what one rank has."""
        return -(-(elements - of_experts) // self.shared) + -(-of_experts // self.experts)


@dataclass(frozen=True, slots=True)
class Run:
    """`count` uses of one unit, one after the other.

    recompute: what of each use runs again in its backward; None: nothing.
    repeated: ZeRO gathers each use by itself; what is not repeated is gathered together, as the
    root. block: stands between the chain's first and last unit. begins: what its stage begins
    with."""

    cost: UnitCost
    count: int
    recompute: Again | None
    repeated: bool
    block: bool = False
    begins: bool = False

    @property
    def again_s(self) -> float:
        """Computing and sending again, of one use."""
        return self.recompute.whole_s if self.recompute else 0.0

    @property
    def away_bytes(self) -> int:
        """What can leave the device of one use; units that stand alone keep theirs."""
        if not self.block:
            return 0
        return self.recompute.away_bytes if self.recompute else self.cost.away_bytes

    @property
    def away_host_bytes(self) -> int:
        """And what that takes in host memory."""
        if not self.block:
            return 0
        return self.recompute.away_host_bytes if self.recompute else self.cost.away_host_bytes

    def kept_bytes(self, cast_bytes: int, expert_cast_bytes: int | None = None) -> int:
        """What autograd keeps of one use; as in `Stage.kept_bytes`."""
        again = self.recompute
        if again is None:
            return self.cost.saved_bytes + self.cast_kept_bytes(cast_bytes, expert_cast_bytes)
        casts = self.cast_kept_bytes(cast_bytes, expert_cast_bytes) if again.keeps_casts else 0
        return again.kept_bytes + casts

    def returning_bytes(self, cast_bytes: int, expert_cast_bytes: int | None = None) -> int:
        """The most bytes beyond those kept while one use goes backward."""
        again = self.recompute
        if again is None:
            return 0
        casts = 0 if again.keeps_casts else self.cast_kept_bytes(cast_bytes, expert_cast_bytes)
        return again.working_bytes + casts

    def working_bytes(self, cast_bytes: int, coming: int = 0, *, first_part: bool = False) -> int:
        """The most beside those, as operators of one use run and free what they needed. `coming`:
        bytes of each element whose gradient comes meanwhile and stays. first_part: of a split
        backward."""
        moments = self.recompute.moments if self.recompute else self.cost.moments
        return fullest_of(moments, coming, cast_bytes, first_part=first_part)

    def cast_kept_bytes(self, cast_bytes: int, expert_cast_bytes: int | None = None) -> int:
        """Of the weights as its operators cast them."""
        split = cast_bytes if expert_cast_bytes is None else expert_cast_bytes
        of_experts = self.cost.expert_cast_elements
        return cast_bytes * (self.cost.cast_elements - of_experts) + split * of_experts


@dataclass(frozen=True)
class Stage:
    """All numbers are per tensor rank; times and kept bytes are of one micro-batch.

    tied_elements: of weights that belong to another stage and stand here as a copy.
    """

    runs: tuple[Run, ...]
    tied_elements: int = 0

    @cached_property
    def parts(self) -> tuple[Stage, ...]:
        """The pipeline stages that it is made of. Copies of weights stand at the chain's end."""
        starts = [i for i, run in enumerate(self.runs) if run.begins]
        ends = [*starts[1:], len(self.runs)]
        tied = [*[0] * (len(starts) - 1), self.tied_elements]
        spans = zip(starts, ends, tied, strict=True)
        return tuple(Stage(self.runs[a:b], copied) for a, b, copied in spans)

    def named_runs(self, names: Sequence[str]) -> list[tuple[str, Run]]:
        """Each run with the name of its instances. `names`: of all of them, in their order."""
        found, place = [], 0
        for run in self.runs:
            found.append((names[place], run))
            place += run.count
        return found

    def _sum(self, name: str) -> float:
        return sum(r.count * getattr(r.cost, name) for r in self.runs)

    def _again(self, name: str) -> float:
        return sum(r.count * getattr(r.recompute, name) for r in self.runs if r.recompute)

    @cached_property
    def forward_s(self) -> float:
        return self._sum("forward_s")

    @cached_property
    def backward_s(self) -> float:
        return self._sum("backward_s") + self._again("forward_s")

    @cached_property
    def tensor_forward_s(self) -> float:
        return self._sum("tensor_forward_s")

    @cached_property
    def tensor_backward_s(self) -> float:
        return self._sum("tensor_backward_s") + self._again("tensor_s")

    @cached_property
    def context_s(self) -> float:
        both = self._sum("context_forward_s") + self._sum("context_backward_s")
        return both + self._again("context_s")

    @cached_property
    def expert_s(self) -> float:
        both = self._sum("expert_forward_s") + self._sum("expert_backward_s")
        return both + self._again("expert_s")

    @cached_property
    def whole_forward_s(self) -> float:
        """Computing and sending, of one micro-batch."""
        return self._sum("whole_forward_s")

    @cached_property
    def whole_backward_s(self) -> float:
        return self._sum("whole_backward_s") + self._again("whole_s")

    @cached_property
    def late_s(self) -> float:
        """Of the backward, what a split one leaves for later."""
        return sum(r.count * r.cost.late.seconds for r in self.runs)

    @cached_property
    def late_bytes(self) -> int:
        """What is kept of one micro-batch between the two parts of a split backward."""
        return sum(r.count * r.cost.late.size_bytes for r in self.runs)

    @cached_property
    def early_elements(self) -> int:
        """Of parameters whose gradients are whole before the second part."""
        return sum(r.count * r.cost.late.early_elements for r in self.runs)

    @cached_property
    def busy_s(self) -> float:
        return self.whole_forward_s + self.whole_backward_s

    @cached_property
    def flops(self) -> float:
        """Executed, forward and backward, of one micro-batch."""
        return self._sum("flops") + self._sum("backward_flops") + self._again("flops")

    @cached_property
    def model_flops(self) -> float:
        return 3 * self._sum("model_flops")

    @cached_property
    def elements(self) -> int:
        return int(self._sum("elements")) + self.tied_elements

    @cached_property
    def expert_elements(self) -> int:
        return int(self._sum("expert_elements"))

    @cached_property
    def shadow_elements(self) -> int:
        return int(self._sum("shadow_elements"))

    @cached_property
    def expert_shadow_elements(self) -> int:
        return int(self._sum("expert_shadow_elements"))

    @cached_property
    def root_elements(self) -> int:
        own = sum(r.count * r.cost.elements for r in self.runs if not r.repeated)
        return own + self.tied_elements

    @cached_property
    def root_expert_elements(self) -> int:
        return sum(r.count * r.cost.expert_elements for r in self.runs if not r.repeated)

    @cached_property
    def root_early_elements(self) -> int:
        return sum(r.count * r.cost.late.early_elements for r in self.runs if not r.repeated)

    def largest_units(self, experts: bool) -> tuple[int, int]:
        """Elements of the two largest of ZeRO's units. `experts`: those of a block are one too, not
        left as they are."""
        sizes = [self.root_elements - self.root_expert_elements]
        sizes += [self.root_expert_elements] if experts else []
        for run in self.runs:
            if run.repeated:
                split = run.cost.expert_elements
                sizes += [run.cost.elements - split] * min(run.count, 2)
                sizes += [split] * min(run.count, 2) if experts else []
        first, second, *_ = (*sorted(sizes, reverse=True), 0)
        return first, second

    def largest_repeated(self, experts: bool) -> tuple[int, int]:
        """Of the two largest repeated blocks, each with its experts or without."""
        sizes = [
            r.cost.elements - (0 if experts else r.cost.expert_elements)
            for r in self.runs
            if r.repeated
            for _ in range(min(r.count, 2))
        ]
        first, second, *_ = (*sorted(sizes, reverse=True), 0, 0)
        return first, second

    @cached_property
    def largest_elements(self) -> int:
        return max((r.cost.largest_elements for r in self.runs), default=0)

    @cached_property
    def spare_elements(self) -> int:
        """Of one weight of each shape that products multiply with."""
        shapes = {shape for r in self.runs if r.block for shape in r.cost.product_shapes}
        return sum(prod(shape) for shape in shapes)

    @cached_property
    def output_bytes(self) -> int:
        return self.runs[-1].cost.output_bytes if self.runs else 0

    @cached_property
    def fixed_kept_bytes(self) -> int:
        """Of `kept_bytes`, what does not grow with the micro-batch."""
        return sum(r.count * r.cost.fixed_saved_bytes for r in self.runs if not r.recompute)

    @cached_property
    def away_bytes(self) -> int:
        """Of what one micro-batch keeps, what can leave the device until its backward."""
        return sum(r.count * r.away_bytes for r in self.runs)

    @property
    def left_input_bytes(self) -> int:
        """Of its input, where what autograd keeps of that leaves: the pipeline holds it for the
        gradient to send back."""
        first = self.runs[0] if self.runs else None
        return first.cost.input_bytes if first is not None and first.away_bytes else 0

    @cached_property
    def away_host_bytes(self) -> int:
        """Of one micro-batch, in host memory from its forward to its backward, where what autograd
        keeps goes there."""
        return sum(r.count * r.away_host_bytes for r in self.runs)

    def kept_bytes(self, cast_bytes: int, expert_cast_bytes: int | None = None) -> int:
        """What autograd keeps of one micro-batch; `cast_bytes`: of each weight element that it
        keeps, `expert_cast_bytes` of those that expert ranks have split (None: the same)."""
        return sum(r.count * r.kept_bytes(cast_bytes, expert_cast_bytes) for r in self.runs)


def together(stages: Sequence[Stage]) -> Stage:
    """What one rank runs, as one stage."""
    if len(stages) == 1:
        return stages[0]
    runs = tuple(run for stage in stages for run in stage.runs)
    return Stage(runs, sum(stage.tied_elements for stage in stages))
