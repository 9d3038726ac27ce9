"""What no plan of an outline can undercut, in seconds and in bytes, before its stages are cut."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from llmspec.compiler.cost.closed import ROUNDING, least_span_s
from llmspec.compiler.cost.data import GATHER, data_cost, sent_s, units_of
from llmspec.compiler.cost.offload import (
    ACTIVATIONS,
    OPTIMIZER,
    PARAMETERS,
    Offload,
    update_s,
)
from llmspec.compiler.cost.rank import held_bytes, run_by_ranks
from llmspec.compiler.cost.stage import Stage
from llmspec.compiler.cost.step import optimizer_s
from llmspec.compiler.orders import Schedule
from llmspec.compiler.search.candidates import Outline, Shape, Sharing, Sketch, Turn, Way
from llmspec.compiler.search.meshes import Grid
from llmspec.compiler.search.options import TensorOption
from llmspec.compiler.search.pins import Recompute
from llmspec.compiler.search.ranges import Ranges
from llmspec.compiler.search.repeats import Repeats
from llmspec.compiler.search.stages import evenest, freed_span_s


@dataclass
class Bounds:
    """Those of equal stages: the worst stage is no better than their mean. offloads: what may live
    in host memory, a choice a tuple; no bound counts what some choice moves there."""

    ranges: Ranges
    repeats: Repeats
    offloads: tuple[Offload, ...]
    budget_bytes: int
    freeing: dict[tuple[int, int], float] = field(default_factory=dict)
    flying: dict[tuple[object, ...], list[tuple[Stage, int]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chain = self.repeats.chain
        self.machine, self.types = self.chain.machine, self.chain.types

    def _leaves(self, what: str) -> bool:
        return any(what in offload for offload in self.offloads)

    def outline(self, sketch: Sketch, option: TensorOption, recompute: Recompute) -> Outline:
        grid, size, count = sketch.grid, sketch.microbatch, sketch.microbatches
        whole = self.repeats.whole(option, size, recompute)
        of_one, kept = self._least_kept(self.repeats.fewest(option, size, recompute))
        fixed = self.machine.fixed_bytes
        return Outline(
            option=option,
            grid=grid,
            microbatch=size,
            microbatches=count,
            recompute=recompute,
            least_s=self._even_span_s(whole.busy_s, whole.late_s, grid.pipeline, count),
            least_bytes=self._outline_bytes(sketch, whole, kept),
            least_whole_bytes=fixed + (of_one * whole.elements + kept) / grid.pipeline,
            busy_s=whole.busy_s,
            late_s=whole.late_s,
            sharp=recompute is not Recompute.SELECTIVE or self._leaves(ACTIVATIONS),
        )

    # -- seconds

    def scheduled_s(self, outline: Outline, interleave: int, schedule: Schedule) -> float:
        """Of an outline's plans under one schedule."""
        span = _span_s(
            outline.busy_s,
            outline.late_s,
            outline.microbatches,
            schedule=schedule,
            ranks=outline.grid.pipeline,
            interleave=interleave,
        )
        return max(outline.least_s, span)

    def sharing(self, outline: Outline, zero: int, shards: int) -> Sharing:
        least_bytes = self.shared_bytes(outline, zero, shards)
        least_s, busy_s, end_s = outline.least_s, outline.busy_s, 0.0
        if least_bytes <= self.budget_bytes:
            busy_s, end_s = self._shared_s(outline, zero, shards)
            least_s = max(least_s, self._least_s(outline, zero, shards, busy_s) + end_s)
        return Sharing(
            outline=outline,
            zero=zero,
            shards=shards,
            least_s=ROUNDING * least_s,
            least_bytes=least_bytes,
            busy_s=busy_s,
            end_s=end_s,
        )

    def turn(self, sharing: Sharing, interleave: int, schedule: Schedule, offload: Offload) -> Turn:
        outline, grid = sharing.outline, sharing.outline.grid
        span_s = outline.microbatches * sharing.busy_s
        if grid.pipeline > 1:
            span_s = _span_s(
                sharing.busy_s,
                outline.late_s,
                outline.microbatches,
                schedule=schedule,
                ranks=grid.pipeline,
                interleave=interleave,
            )
        update_s = self._update_s(outline, sharing.zero, sharing.shards, offload)
        return Turn(
            sharing=sharing,
            interleave=interleave,
            schedule=schedule,
            offload=offload,
            least_s=max(sharing.least_s, ROUNDING * (span_s + sharing.end_s + update_s)),
        )

    def _shared_s(self, outline: Outline, zero: int, shards: int) -> tuple[float, float]:
        """Of an outline's plans that shard so: (a micro-batch on the whole chain, with what it does
        besides and the gathers that computing forward does not hide; what a step takes besides but
        for the update). A stage has at least the mean of each; what comes backward may hide behind
        what is computed again."""
        grid, types, machine = outline.grid, self.types, self.machine
        whole = self.repeats.whole(outline.option, outline.microbatch, outline.recompute)
        groups = self.repeats.pricing.groups(grid.mesh(shards))
        data = data_cost(whole, zero, outline.microbatches, groups, types, machine)
        opening = 0.0
        if zero and grid.pipeline > 1:
            units = units_of(whole)
            opening = max((sent_s(GATHER, types.compute, u, groups) for u in units), default=0.0)
        busy_s = whole.busy_s + data.weights_forward_s + data.weights_backward_s
        busy_s += max(0.0, data.forward_s - opening)
        return busy_s, max(0.0, data.first_s - opening) / grid.pipeline

    def _update_s(self, outline: Outline, zero: int, shards: int, offload: Offload) -> float:
        """Of the optimizer on the rank that has most of the weights, without the link to a host."""
        grid = outline.grid
        whole = self.repeats.whole(outline.option, outline.microbatch, outline.recompute)
        held = grid.parts(zero, shards).largest(whole.elements, whole.expert_elements)
        held //= grid.pipeline
        on_host = update_s(held, self.types, self.machine, offload)
        return on_host[0] if on_host else optimizer_s(held, self.types, self.machine)

    def _least_s(self, outline: Outline, zero: int, shards: int, busy_s: float) -> float:
        """Under whichever schedule, and whatever is in host memory."""
        grid, machine = outline.grid, self.machine
        pipeline, count = grid.pipeline, outline.microbatches
        span_s = self._even_span_s(busy_s, outline.late_s, pipeline, count)
        if outline.recompute is Recompute.SELECTIVE and not self._leaves(ACTIVATIONS):
            stored, kept = self._shared_stored(outline, zero, shards)
            freed_s = freed_span_s(
                busy_s=busy_s,
                kept=kept,
                stored=stored,
                budget=self.budget_bytes - machine.fixed_bytes,
                s_per_byte=lambda: self._cheapest_s(outline.option, outline.microbatch),
                pipeline=pipeline,
                microbatches=count,
            )
            span_s = max(span_s, freed_s)
        updates = (self._update_s(outline, zero, shards, offload) for offload in self.offloads)
        return span_s + min(updates)

    def _even_span_s(self, busy_s: float, late_s: float, pipeline: int, microbatches: int) -> float:
        """No cut under any schedule has a shorter step."""
        if pipeline == 1:
            return microbatches * busy_s
        spans = (
            _span_s(
                busy_s,
                late_s,
                microbatches,
                schedule=schedule,
                ranks=pipeline,
                interleave=interleave,
            )
            for interleave, schedules in self.ranges.ways(pipeline)
            for schedule in schedules
        )
        return min(spans, default=0.0)

    def sharpened(self, outline: Outline) -> Outline:
        """With the bound of seconds that counts what does not fit, and is computed again."""
        if outline.sharp:
            return outline
        option, size = outline.option, outline.microbatch
        whole = self.repeats.whole(option, size, outline.recompute)
        span = freed_span_s(
            busy_s=whole.busy_s,
            kept=whole.kept_bytes(0),
            stored=self._stored_bytes(outline.grid, whole),
            budget=self.budget_bytes - self.machine.fixed_bytes,
            s_per_byte=lambda: self._cheapest_s(option, size),
            pipeline=outline.grid.pipeline,
            microbatches=outline.microbatches,
        )
        return replace(outline, least_s=max(outline.least_s, span), sharp=True)

    def _cheapest_s(self, option: TensorOption, microbatch: int) -> float:
        """Seconds of computing again for each byte that is not kept, at the least."""
        key = (id(option), microbatch)
        if key not in self.freeing:
            costs = self.chain.costs(option, microbatch)
            names = dict.fromkeys(i.unit for i in self.chain.instances if i.prefix)
            self.freeing[key] = min(
                (
                    again.whole_s / (costs[name].saved_bytes - again.kept_bytes)
                    for name in names
                    for again in self.chain.policies.trades(option, microbatch, name)
                    if again.kept_bytes < costs[name].saved_bytes
                ),
                default=0.0,
            )
        return self.freeing[key]

    # -- bytes

    def sketch_bytes(self, sketch: Sketch, options: list[TensorOption]) -> float:
        """Of all plans of a sketch, from the costs of one sequence: what is kept grows with the
        micro-batch. `options`: placements for the sketch's view, or for one without context."""
        bounds = []
        for option in options:
            for recompute in self.ranges.recomputes:
                fewest = self.repeats.fewest(option, 1, recompute)
                fixed = fewest.fixed_kept_bytes
                growing = (self._least_kept(fewest)[1] - fixed) / sketch.grid.context
                kept = sketch.microbatch * growing + fixed
                bounds.append(self._outline_bytes(sketch, fewest, kept))
        return min(bounds, default=0.0)

    def _outline_bytes(self, sketch: Sketch, whole: Stage, kept: float) -> float:
        """`kept`: of one micro-batch in all stages."""
        grid = sketch.grid
        stored = self._stored_bytes(grid, whole)
        return self.machine.fixed_bytes + evenest(stored, kept, grid.pipeline, sketch.microbatches)

    def shared_bytes(self, outline: Outline, zero: int, shards: int) -> float:
        """Of an outline's plans that shard so."""
        stored, kept = self._shared_stored(outline, zero, shards)
        flying = evenest(stored, kept, outline.grid.pipeline, outline.microbatches)
        return self.machine.fixed_bytes + flying

    def _shared_stored(self, outline: Outline, zero: int, shards: int) -> tuple[float, int]:
        """(bytes of all stages that are there once, and for each micro-batch in flight)."""
        whole = self.repeats.fewest(outline.option, outline.microbatch, outline.recompute)
        of_one, kept = self._least_kept(whole)
        gone = self._leaves(PARAMETERS)
        stored = self._stored(outline, whole, zero, shards, of_one, gone=gone)
        return stored, kept

    def _stored(
        self,
        outline: Outline | Shape,
        stage: Stage,
        zero: int,
        shards: int,
        of_one: int,
        *,
        gone: bool,
    ) -> float:
        """Bytes of a stage that are there once. of_one: of a weight and its optimizer; gone:
        weights and their gradients are not on the device."""
        grid, types = outline.grid, self.types
        part = grid.parts(zero, shards).largest(stage.elements, stage.expert_elements)
        stored = of_one * part
        if not gone:
            # whole sums of all stages have come, and as much is in flight, some time
            steady = outline.microbatches >= 2 * grid.pipeline
            shared = stage.elements - stage.expert_elements
            if (zero == 0 and grid.data * grid.context > 1) or (zero == 1 and steady):
                stored += types.gradients * shared
            elif zero > 0 and steady:
                stored += types.gradients * part
            stored += types.compute * shared if zero in (1, 2) else 0
        return stored

    def way_bytes(self, way: Way) -> float:
        """Of the plans of a way: its own stages, with what its schedule has in flight."""
        gone, types = PARAMETERS in way.offload, self.types
        moments = 0 if gone or OPTIMIZER in way.offload else types.moments
        of_one = moments + (0 if gone else types.weights)
        most = 0.0
        for stage, flying in self._in_flight(way):
            stored = self._stored(way.shape, stage, way.zero, way.shards, of_one, gone=gone)
            most = max(most, stored + (0 if ACTIVATIONS in way.offload else flying))
        return self.machine.fixed_bytes + most

    def _in_flight(self, way: Way) -> list[tuple[Stage, int]]:
        """What each rank runs, and the least bytes that it has of micro-batches in flight when
        these are most."""
        shape, schedule = way.shape, way.schedule
        made = (id(shape.option), shape.microbatch, shape.recompute, shape.cut)
        key = (*made, shape.grid.pipeline, shape.microbatches, schedule)
        if key not in self.flying:
            ranks, bare = shape.grid.pipeline, self.repeats.bare(shape)
            whole = self.repeats.fewest(shape.option, shape.microbatch, shape.recompute)
            each = [run.kept_bytes(0) for run in whole.runs for _ in range(run.count)]
            kept = [sum(each[slice(*span)]) for span in shape.cut]
            held = held_bytes(schedule, bare, kept, ranks, shape.microbatches)
            self.flying[key] = list(zip(run_by_ranks(schedule, bare, ranks), held, strict=True))
        return self.flying[key]

    def _stored_bytes(self, grid: Grid, whole: Stage) -> float:
        """Of all stages, once, on a rank that shares with as many others as there are."""
        elements = whole.elements + (grid.expert - 1) * whole.expert_elements
        return self._least_kept(whole)[0] * elements / (grid.data * grid.context)

    def _least_kept(self, whole: Stage) -> tuple[int, int]:
        """(bytes of a weight and its optimizer, bytes of activations) that no choice of what to
        offload brings lower."""
        away = self._leaves(OPTIMIZER) or self._leaves(PARAMETERS)
        moments = 0 if away else self.types.moments
        weights = 0 if self._leaves(PARAMETERS) else self.types.weights
        kept = whole.kept_bytes(0)
        if self._leaves(ACTIVATIONS):
            kept -= sum(run.count * run.away_bytes for run in whole.runs)
        return weights + moments, kept


def _span_s(
    busy_s: float,
    late_s: float,
    microbatches: int,
    *,
    schedule: Schedule,
    ranks: int,
    interleave: int,
) -> float:
    span = least_span_s(
        busy_s, late_s, microbatches, schedule=schedule, ranks=ranks, interleave=interleave
    )
    return ROUNDING * span
