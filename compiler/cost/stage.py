"""One pipeline stage on one rank: the sum of the units that it runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from llmspec.compiler.cost.unit import UnitCost


@dataclass(frozen=True, slots=True)
class Run:
    """`count` uses of one unit, one after the other.

    recompute: only each use's input is kept, and its forward runs again in the backward.
    repeated: ZeRO gathers each use by itself; what is not repeated is gathered together, as the
    root."""

    cost: UnitCost
    count: int
    recompute: bool
    repeated: bool


@dataclass(frozen=True)
class Stage:
    """All numbers are per tensor rank; times and kept bytes are of one micro-batch.

    tied_elements: of weights that belong to another stage and stand here as a copy.
    """

    runs: tuple[Run, ...]
    tied_elements: int = 0

    def _sum(self, name: str) -> float:
        return sum(r.count * getattr(r.cost, name) for r in self.runs)

    def _again(self, name: str) -> float:
        return sum(r.count * getattr(r.cost, name) for r in self.runs if r.recompute)

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
        return self._sum("tensor_backward_s") + self._again("tensor_forward_s")

    @cached_property
    def context_s(self) -> float:
        both = self._sum("context_forward_s") + self._sum("context_backward_s")
        return both + self._again("context_forward_s")

    @cached_property
    def expert_s(self) -> float:
        both = self._sum("expert_forward_s") + self._sum("expert_backward_s")
        return both + self._again("expert_forward_s")

    @cached_property
    def whole_forward_s(self) -> float:
        """Computing and sending, of one micro-batch."""
        return self._sum("whole_forward_s")

    @cached_property
    def whole_backward_s(self) -> float:
        return self._sum("whole_backward_s") + self._again("whole_forward_s")

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
    def shadow_elements(self) -> int:
        return int(self._sum("shadow_elements"))

    @cached_property
    def root_elements(self) -> int:
        own = sum(r.count * r.cost.elements for r in self.runs if not r.repeated)
        return own + self.tied_elements

    @cached_property
    def largest_units(self) -> tuple[int, int]:
        """Elements of the two largest of ZeRO's units."""
        sizes = [r.cost.elements for r in self.runs if r.repeated for _ in range(min(r.count, 2))]
        first, second, *_ = (*sorted([*sizes, self.root_elements], reverse=True), 0)
        return first, second

    @cached_property
    def largest_repeated(self) -> tuple[int, int]:
        """The same, the root left out."""
        sizes = [r.cost.elements for r in self.runs if r.repeated for _ in range(min(r.count, 2))]
        first, second, *_ = (*sorted(sizes, reverse=True), 0, 0)
        return first, second

    @cached_property
    def largest_elements(self) -> int:
        return max((r.cost.largest_elements for r in self.runs), default=0)

    @cached_property
    def working_bytes(self) -> int:
        return max((r.cost.working_bytes for r in self.runs), default=0)

    @cached_property
    def output_bytes(self) -> int:
        return self.runs[-1].cost.output_bytes if self.runs else 0

    def kept_bytes(self, cast_bytes: int) -> int:
        """What autograd keeps of one micro-batch; `cast_bytes`: of each weight element that it
        keeps."""
        total = 0
        for run in self.runs:
            if run.recompute:
                total += run.count * run.cost.input_bytes
            else:
                kept = run.cost.saved_bytes + cast_bytes * run.cost.cast_elements
                total += run.count * kept
        return total

    def recomputed_bytes(self, cast_bytes: int) -> int:
        """What the one block that is being recomputed keeps meanwhile."""
        again = (r.cost for r in self.runs if r.recompute)
        return max((c.saved_bytes + cast_bytes * c.cast_elements for c in again), default=0)
