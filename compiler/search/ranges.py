"""What each key of a plan may be: the values that are tried, less those that a spec's lines
forbid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd

from llmspec.compiler.cost.fused import worth_weighing
from llmspec.compiler.ops.attention import key_heads
from llmspec.compiler.ops.linear_loss import rows_at_once
from llmspec.compiler.ops.registry import shape_of
from llmspec.compiler.passes.context import possible_styles
from llmspec.compiler.passes.experts import expert_divisor
from llmspec.compiler.passes.loss import joined_weight
from llmspec.compiler.schedules import Schedule
from llmspec.compiler.search.candidates import SIMPLER
from llmspec.compiler.search.chain import Chain
from llmspec.compiler.search.meshes import Grid, divisors, grids, shardings
from llmspec.compiler.search.objective import Objective
from llmspec.compiler.search.pins import Pins, Recompute
from llmspec.compiler.views import View
from llmspec.dsl.mesh_pins import heads_of
from llmspec.dsl.program import Model, Program

FEWEST_TOKENS = 8192
"""That a context rank holds unless the spec speaks of context ranks itself."""

INTERLEAVES = (1, 2, 4)
"""Stages on each rank that are tried unless the spec speaks of them."""
ONLY_PINNED = (
    (Schedule.GPIPE, 1),
    (Schedule.DUALPIPEV, 2),
    (Schedule.ZERO_BUBBLE, 2),
    (Schedule.ZERO_BUBBLE, 4),
)
"""(schedule, stages on a rank) that are tried only where the spec speaks of schedules. GPipe takes
as long as 1F1B and holds more. ZBV has two stages on a rank and no bubble either; DualPipeV is for
overlapping a forward with a backward, which is not done here."""


@dataclass
class Ranges:
    program: Program
    pins: Pins
    chain: Chain

    def grids(self) -> list[Grid]:
        cluster, graph = self.program.cluster, self.chain.graph(1)
        fewest = 1 if self.pins.about("context") else FEWEST_TOKENS
        sharing = (
            n
            for n in divisors(cluster.world_size)
            if n > 1 and graph.tokens >= n * fewest and possible_styles(graph, n)
        )
        found = grids(
            cluster.world_size,
            cluster.devices_per_node,
            self.chain.blocks,
            self.pins,
            contexts=(1, *sharing),
            experts=expert_divisor(graph),
        )
        common = gcd(*self.heads)
        return [grid for grid in found if common % grid.tensor == 0]

    @cached_property
    def heads(self) -> list[int]:
        """Key/value heads of each attention: tensor ranks have as many whole ones each."""
        written = heads_of(self.program.model) if isinstance(self.program.model, Model) else []
        units = self.chain.graph(1).units.values()
        return written + [n for unit in units for n in key_heads(unit.calls())]

    def context_styles(self, context: int) -> list[str]:
        styles = possible_styles(self.chain.graph(1), context)
        return [style for style in styles if self.pins.allows("context_style", style)]

    def loss_rows(self, tensor: int) -> int | None:
        """Of logits that are there at once where they can be joined with the loss: that takes no
        longer than all of them."""
        weight = joined_weight(self.chain.graph(1))
        if weight is None or self.chain.machine.whole_logits:
            return None
        vocabulary = shape_of(weight)[0]
        return rows_at_once(-(-vocabulary // tensor), self.chain.types.compute)

    @cached_property
    def kernels(self) -> tuple[str, ...]:
        """What may run the operators, less what another is never slower than."""
        return worth_weighing(self.pins.kernels(), self.chain.machine)

    def with_logits(self, view: View, grid: Grid, microbatch: int) -> list[View]:
        """With logits joined, and as a value of their own where that may keep less: a micro-batch
        has fewer tokens than the model is wide, so that they are smaller than the gradient of their
        weight, and several micro-batches wait for their backward."""
        weight = joined_weight(self.chain.graph(1))
        tokens = microbatch * self.chain.graph(1).tokens // grid.context
        if weight is None or view.loss_rows is None:
            return [view]
        if grid.pipeline == 1 or tokens >= shape_of(weight)[1]:
            return [view]
        return [view, replace(view, loss_rows=None)]

    @cached_property
    def sequences(self) -> tuple[bool, ...]:
        """Whether values between blocks are split along their tokens."""
        return tuple(s for s in (False, True) if self.pins.allows("sequence", s))

    def microbatches(self, grid: Grid) -> Iterator[tuple[int, int]]:
        """(sequences of a micro-batch, how many) that make up the batch, and each size of its ramp,
        exactly."""
        batch, common = self.program.train.batch_sequences, self.program.train.common_sequences
        if common % grid.data:
            return
        rank = batch // grid.data
        free = not any(self.pins.about(key) for key in ("context", "data", "microbatch"))
        for size in self.pins.allowed("microbatch", divisors(common // grid.data)):
            # ranks that share a sequence while each could have its own send for nothing
            if not (free and gcd(size, grid.context) > 1):
                yield size, rank // size

    @cached_property
    def recomputes(self) -> tuple[Recompute, ...]:
        """What blocks may do; what stands alone never computes again."""
        allowed = self.pins.recompute()
        smaller = Objective(self.program.prefer).smaller_is_better
        if Recompute.SELECTIVE in allowed and not smaller:
            # what it comes to when nothing less fits
            allowed = tuple(kind for kind in allowed if kind is not Recompute.FULL)
        alone = not any(i.prefix for i in self.chain.instances)
        return (Recompute.NONE,) if alone and Recompute.NONE in allowed else allowed

    def ways(self, pipeline: int) -> list[tuple[int, list[Schedule]]]:
        """Stages on each rank, and the schedules that may then be."""
        pairs = ((v, self._schedules(pipeline, v)) for v in self._interleaves(pipeline))
        return [(interleave, found) for interleave, found in pairs if found]

    def _interleaves(self, pipeline: int) -> list[int]:
        pinned, blocks = self.pins.stage_blocks(), self.chain.blocks
        tried = [v for v in range(1, blocks // pipeline + 1) if v in INTERLEAVES]
        if self.pins.about("interleave") or pinned is not None:
            tried = list(range(1, blocks // pipeline + 1))
        if pipeline == 1:
            tried = [1]
        if pinned is not None:
            tried = [v for v in tried if v * pipeline == len(pinned)]
        return self.pins.allowed("interleave", tried)

    def _schedules(self, pipeline: int, interleave: int) -> list[Schedule]:
        if pipeline == 1:
            return [Schedule.ONE_F_ONE_B]
        fitting = [s for s in SIMPLER if s.allows(interleave)]
        if self.pins.about("schedule"):
            return [s for s in fitting if self.pins.allows("schedule", str(s))]
        return [s for s in fitting if (s, interleave) not in ONLY_PINNED]

    def shardings(self, grid: Grid) -> list[tuple[int, int]]:
        """(level of ZeRO, shards of the data ranks)."""
        return list(shardings(grid, self.pins, self.program.cluster.devices_per_node))

    def plans(self, grid: Grid) -> tuple[int, int]:
        """How many there are of one placement and recomputation with nothing in host memory, before
        stages are cut: (of one way to share, of all)."""
        of_one = sum(len(schedules) for _, schedules in self.ways(grid.pipeline))
        return of_one, of_one * len(self.shardings(grid))
