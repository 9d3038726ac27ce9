"""The space of plans: from meshes to outlines, from outlines to priced candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from llmspec.compiler.cost.hardware import Machine, machine_of
from llmspec.compiler.cost.offload import CHOICES as OFFLOADS
from llmspec.compiler.cost.offload import PARAMETERS, Offload
from llmspec.compiler.cost.types import Types, types_of
from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.schedules import Schedule
from llmspec.compiler.search.bounds import Bounds
from llmspec.compiler.search.candidates import (
    Candidate,
    Family,
    Floor,
    Outline,
    Shape,
    Sharing,
    Sketch,
    Way,
)
from llmspec.compiler.search.chain import Build, Chain
from llmspec.compiler.search.limits import Limits, steps_of
from llmspec.compiler.search.meshes import Grid
from llmspec.compiler.search.objective import Objective
from llmspec.compiler.search.options import TensorOption
from llmspec.compiler.search.pins import Pins, Recompute
from llmspec.compiler.search.policies import Chosen
from llmspec.compiler.search.pricing import Pricing
from llmspec.compiler.search.ranges import Ranges
from llmspec.compiler.search.repeats import Repeats
from llmspec.compiler.search.stages import Cut, balanced, block_starts, cut_at
from llmspec.compiler.views import WHOLE_VIEW, View
from llmspec.dsl.left_open import each_settled
from llmspec.dsl.program import Budget, Cluster, Prefer, Program


@dataclass
class Space:
    """All plans of one program under some lines of a `plan` block.

    chain, pricing: the same whatever the lines say. offloads: what may live in host memory, a
        choice a tuple. besides: plans without offload have been looked at already. host_needed:
        the least host memory of a rank among the plans that had too little. choices, choice: what
        the program makes of the keys of its train block that are left open, and which of the ways
        to do so that is. others: the same space under the other ways.
    """

    program: Program
    pins: Pins
    chain: Chain
    pricing: Pricing
    repeats: Repeats
    offloads: tuple[Offload, ...] = ((),)
    besides: bool = False
    host_needed: int | None = None
    choices: tuple[Family, ...] = ()
    choice: int = 0
    others: tuple[Space, ...] = ()
    styles: dict[tuple[int, int, int], list[View]] = field(default_factory=dict)
    known_cuts: dict[tuple[object, ...], list[Cut]] = field(default_factory=dict)
    fitting: dict[tuple[object, ...], bool] = field(default_factory=dict)

    @staticmethod
    def of(program: Program, build: Build) -> Space:
        """Errors: Unsupported for what cannot be priced or pinned yet."""
        known: dict[Types, tuple[Chain, Pricing]] = {}
        spaces = []
        for number, (words, one) in enumerate(each_settled(program)):
            types = types_of(one.train)
            if types not in known:
                machine = machine_of(one.cluster, types)
                known[types] = Chain(build, machine, types), Pricing(machine, types)
            space = _space(one, Pins.of(one), *known[types])
            spaces.append(replace(space, choices=tuple(words.items()), choice=number))
        return replace(spaces[0], others=tuple(spaces[1:]))

    def _changed(self, change: Callable[[Program], Program]) -> Space:
        """What is known of the model's parts stays known."""
        program = change(self.program)
        made = _space(program, Pins.of(program), self.chain, self.pricing)
        others = tuple(other._changed(change) for other in self.others)
        return replace(made, choices=self.choices, choice=self.choice, others=others)

    def pinned(self, pins: Pins) -> Space:
        """The same program under other lines."""
        return self._changed(lambda program: replace(program, plan=pins.constraints))

    def changed(
        self,
        *,
        cluster: Cluster | None = None,
        budget: Budget | None = None,
        prefer: Prefer | None = None,
    ) -> Space:
        """On other nodes of the same kind, under another budget, with something else preferred."""
        return self._changed(
            lambda program: replace(
                program,
                cluster=cluster or program.cluster,
                budget=budget or program.budget,
                prefer=prefer or program.prefer,
            )
        )

    def apart(self) -> tuple[Space, ...]:
        """One for each number of nodes that the search may take, most first, and each way to decide
        what the train block leaves open."""
        cluster = self.program.cluster
        if not cluster.nodes_are_bound:
            return (self, *self.others)
        fewer = (self.changed(cluster=cluster.of(n)) for n in range(cluster.nodes, 0, -1))
        return tuple(one for space in fewer for one in space.apart())

    def home(self, found: Candidate) -> Space:
        """The way to decide what is left open that a candidate is of."""
        return next(s for s in (self, *self.others) if s.choices == found.choices)

    def with_offload(self) -> Space | None:
        """The plans besides: those that use host memory. None when the lines decide that, or the
        device's memory is the host's."""
        if self.pins.about("offload") or self.offloads != ((),) or not self.machine.pinned:
            return None
        return replace(self, offloads=OFFLOADS, besides=True)

    @property
    def machine(self) -> Machine:
        return self.chain.machine

    @property
    def types(self) -> Types:
        return self.chain.types

    @property
    def host_bytes(self) -> int:
        """Host memory of one rank."""
        cluster, budget = self.program.cluster, self.program.budget
        here = min(cluster.devices_per_node, cluster.world_size)
        return (budget.host_memory_bytes or cluster.host_memory_bytes) // here

    @property
    def ranks(self) -> int:
        return self.program.cluster.world_size

    @cached_property
    def least_s(self) -> float:
        """No plan has a shorter step: matrix products at the device's nominal peak."""
        flops = self.chain.least_flops * self.program.train.batch_tokens
        return flops / self.ranks / self.machine.peak_flops

    @cached_property
    def most_step_s(self) -> float:
        """No plan with a longer step keeps to the deadline and the cost."""
        return self.limits.step_s(self.ranks)

    @cached_property
    def limits(self) -> Limits:
        return Limits(self.program)

    @property
    def objective(self) -> Objective:
        return Objective(self.program.prefer)

    @property
    def budget_bytes(self) -> int:
        return self.program.budget.memory_bytes

    @cached_property
    def ranges(self) -> Ranges:
        return Ranges(self.program, self.pins, self.chain)

    @cached_property
    def bounds(self) -> Bounds:
        return Bounds(self.ranges, self.repeats, self.offloads, self.budget_bytes)

    def graph(self, microbatch: int, view: View = WHOLE_VIEW) -> ModelGraph:
        return self.chain.graph(microbatch, view)

    def tensor_options(self, ranks: int, microbatch: int, view: View) -> list[TensorOption]:
        placed = self.chain.tensor_options(ranks, microbatch, view, self.ranges.sequences)
        kinds = self.ranges.kernels
        return [self.chain.with_kernels(option, k) for option in placed for k in kinds]

    # -- sketches and outlines

    def sketches(self) -> list[Sketch]:
        """Every mesh and micro-batch. What a view costs is bounded by the whole model: the same
        work in smaller pieces, and what is sent besides."""
        return [
            self._sketch(Sketch(grid=grid, view=view, microbatch=size, microbatches=count))
            for grid in self.ranges.grids()
            for size, count in self.ranges.microbatches(grid)
            for shared in self.views(grid)
            for view in self.ranges.with_logits(shared, grid, size)
        ]

    def views(self, grid: Grid) -> list[View]:
        """Styles that are slower than another and keep no less are left out."""
        plain = View(expert=grid.expert, loss_rows=self.ranges.loss_rows(grid.tensor))
        if grid.context == 1:
            return [plain]
        key = (grid.tensor, grid.context, grid.expert)
        if key not in self.styles:
            found = [
                replace(plain, context=grid.context, style=style)
                for style in self.ranges.context_styles(grid.context)
            ]
            self.styles[key] = found if len(found) < 2 else self._worth_having(grid.tensor, found)
        return self.styles[key]

    def _worth_having(self, tensor: int, views: list[View]) -> list[View]:
        priced = []
        for view in views:
            options = self.tensor_options(tensor, 1, view)
            whole = [self.repeats.whole(option, 1, Recompute.NONE) for option in options]
            least_s = min((w.busy_s for w in whole), default=float("inf"))
            priced.append((least_s, min((w.kept_bytes(0) for w in whole), default=0), view))
        priced.sort(key=lambda p: p[:2])
        kept: list[tuple[float, int, View]] = []
        for one in priced:
            if not any(other[1] <= one[1] for other in kept):
                kept.append(one)
        return [view for _, _, view in kept]

    def _sketch(self, sketch: Sketch) -> Sketch:
        """Without context ranks there is no bound of seconds: fewer experts on a rank are less
        work."""
        whole = replace(sketch, view=replace(sketch.view, context=1, style=None))
        options = self.tensor_options(sketch.grid.tensor, 1, whole.view)
        least_bytes = self.bounds.sketch_bytes(whole, options)
        if least_bytes > self.budget_bytes or sketch.view.context == 1:
            return replace(sketch, least_bytes=least_bytes)
        least_s = min((o.least_s for o in self.opened(whole)), default=0.0)
        return replace(sketch, least_s=least_s / sketch.grid.context, least_bytes=least_bytes)

    def opened(self, sketch: Sketch) -> list[Outline]:
        return [
            self.bounds.outline(sketch, option, recompute)
            for option in self.tensor_options(sketch.grid.tensor, sketch.microbatch, sketch.view)
            for recompute in self.ranges.recomputes
        ]

    def outlines(self) -> list[Outline]:
        """Every one, the most promising first."""
        found = [outline for sketch in self.sketches() for outline in self.opened(sketch)]
        return sorted(found, key=lambda o: o.least_s)

    def plans_in(self, item: Sketch | Outline | Sharing) -> int:
        """How many there are, before stages are cut."""
        grid = item.outline.grid if isinstance(item, Sharing) else item.grid
        of_sharing, of_outline = self.ranges.plans(grid)
        uses = len(self.offloads) - self.besides
        match item:
            case Sharing():
                return uses * of_sharing
            case Outline():
                return uses * of_outline
            case _:
                placed = self.tensor_options(grid.tensor, item.microbatch, item.view)
                return uses * of_outline * len(placed) * len(self.ranges.recomputes)

    # -- stages

    def shapes(self, outline: Outline, interleave: int = 1) -> list[Shape]:
        return [
            Shape(
                option=outline.option,
                grid=outline.grid,
                microbatch=outline.microbatch,
                microbatches=outline.microbatches,
                recompute=outline.recompute,
                cut=cut,
            )
            for cut in self._cuts(outline, interleave)
        ]

    def _cuts(self, outline: Outline, interleave: int) -> list[Cut]:
        """The fastest cut; with one stage on each rank also one that evens out what 1F1B's stages
        hold. Several are so small that their ranks hold much the same."""
        graph, pipeline = self.graph(1), outline.grid.pipeline
        if pipeline == 1:
            return [((0, len(graph.instances)),)]
        pinned = self.pins.stage_blocks()
        if pinned is not None:
            return [cut_at(graph, pinned)] if sum(pinned) == self.chain.blocks else []
        own_choice = outline.recompute is Recompute.SELECTIVE  # cut as if nothing ran again
        recompute = Recompute.NONE if own_choice else outline.recompute
        known = (id(outline.option), outline.microbatch, recompute)
        key = (*known, pipeline, interleave)
        if key not in self.known_cuts:
            times, held = self._block_weights(outline)
            ways = [balanced(times, pipeline * interleave)]
            if interleave == 1:
                in_flight = [float(pipeline - s) for s in range(pipeline)]
                ways.append(balanced(held, pipeline, in_flight))
            self.known_cuts[key] = [cut_at(graph, blocks) for blocks in dict.fromkeys(ways)]
        return self.known_cuts[key]

    def _block_weights(self, outline: Outline) -> tuple[list[float], list[float]]:
        """Seconds and kept bytes of each block, with what rides along with it."""
        option, size = outline.option, outline.microbatch
        chosen = self.repeats.alike(option, size, outline.recompute)
        starts = block_starts(self.graph(1))
        stops = [*starts[1:], len(chosen)]
        stages = [
            self.chain.stage(option, size, chosen[start:stop], start, alone=False)
            for start, stop in zip(starts, stops, strict=True)
        ]
        return [s.busy_s for s in stages], [float(s.kept_bytes(0)) for s in stages]

    # -- candidates

    def candidates(self, outline: Outline) -> Iterator[Candidate]:
        """Every plan of an outline; those that do not fit have no times. Where each block has its
        own choice, the fastest choice that fits; no plan where nothing needs to be computed
        again, unless the spec asks for it."""
        for interleave, schedules in self.ranges.ways(outline.grid.pipeline):
            for zero, shards in self.ranges.shardings(outline.grid):
                for schedule in schedules:
                    for offload in self.offloads:
                        for way in self.ways(outline, interleave, schedule, zero, shards, offload):
                            if (found := self.priced(way)) is not None:
                                yield found

    def ways(
        self,
        outline: Outline,
        interleave: int,
        schedule: Schedule,
        zero: int,
        shards: int,
        offload: Offload,
    ) -> Iterator[Way]:
        """One for each cut; none where parameters cannot leave, or it has been looked at."""
        if PARAMETERS in offload and not _parameters_can_leave(outline.grid, zero):
            return
        if self.besides and not offload:
            return
        for shape in self.shapes(outline, interleave):
            yield Way(shape=shape, zero=zero, shards=shards, schedule=schedule, offload=offload)

    def floor(self, way: Way) -> Floor:
        return self.repeats.floor(way)

    def misses(self, way: Way, floor: Floor) -> float:
        """Bytes by which no choice of what to compute again makes a plan fit; not positive where
        one may."""
        if way.shape.recompute is Recompute.NONE:
            return floor.bare_missing_bytes
        if _one_at_a_time(way):
            return floor.missing_bytes
        # in flight is what only the whole plan's ledger counts; nothing keeps less than inputs
        return self.repeats.missing(way)

    def host_lacks(self, way: Way, floor: Floor) -> bool:
        """Whether there is too little host memory whatever is computed again."""
        if way.shape.recompute is Recompute.NONE:
            return floor.bare_host_bytes > self.host_bytes
        return _one_at_a_time(way) and floor.host_bytes > self.host_bytes

    def priced(self, way: Way) -> Candidate | None:
        """None where nothing need be computed again, where the host has no memory for it, and where
        less in host memory is enough: what adds to a plan that fits is slower, if smaller."""
        if not self.objective.smaller_is_better and any(
            self._fits(replace(way, offload=less))
            for less in self.offloads
            if set(less) < set(way.offload)
        ):
            return None
        chosen = self.repeats.chosen(way)
        return None if chosen is None else self._candidate(way, chosen)

    def _fits(self, way: Way) -> bool:
        if PARAMETERS in way.offload and not _parameters_can_leave(way.shape.grid, way.zero):
            return False
        if way.key not in self.fitting:
            found = None if self.misses(way, self.floor(way)) > 0 else self.priced(way)
            self.fitting[way.key] = found is not None and found.times is not None
        return self.fitting[way.key]

    def _candidate(self, way: Way, chosen: Chosen) -> Candidate | None:
        """None when the host has no memory for it."""
        shape, zero, shards, schedule = way.shape, way.zero, way.shards, way.schedule
        offload, price = way.offload, self.pricing
        stages = self.repeats.stages(shape, chosen)
        memory, host = price.worst_ledger(shape, stages, zero, shards, schedule, offload)
        if host.total > self.host_bytes:
            self.host_needed = min(host.total, self.host_needed or host.total)
            return None
        times = None
        if memory.total <= self.budget_bytes:
            times = price.times(shape, stages, zero, shards, schedule, offload, play=False)
        return Candidate(
            shape=shape,
            zero=zero,
            shards=shards,
            schedule=schedule,
            ledger=memory,
            times=times,
            offload=offload,
            host=host,
            recompute=chosen,
            choices=self.choices,
            choice=self.choice,
        )

    def played(self, candidate: Candidate) -> Candidate:
        """The same plan, its time taken from its action lists."""
        home = self.home(candidate)
        times = home.pricing.times(
            candidate.shape,
            home.repeats.stages(candidate.shape, candidate.recompute),
            candidate.zero,
            candidate.shards,
            candidate.schedule,
            candidate.offload,
            play=True,
        )
        return replace(candidate, times=times)

    # -- the whole run

    def in_time(self, found: Candidate) -> bool:
        """Whether a plan fits, and a run keeps to the deadline and the cost."""
        if found.times is None or found.step_s > self.most_step_s:
            return False
        return not self.limits.any or self.run_s(self.played(found)) <= self.limits.run_s(
            self.ranks
        )

    def run_s(self, found: Candidate) -> float:
        """Of a plan that has been played."""
        steps = steps_of(self.program.train)
        if steps is None:
            return float("inf")
        rising = self.program.train.ramp_stages
        ramp = sum(n * self.smaller(found, sequences).step_s for n, sequences in rising)
        return ramp + (steps - sum(n for n, _ in rising)) * found.step_s

    def smaller(self, found: Candidate, sequences: int) -> Candidate:
        """The same plan with fewer micro-batches, for a size of a batch that grows."""
        shape = found.shape
        count = sequences // found.mesh.data // shape.microbatch
        return self.played(replace(found, shape=replace(shape, microbatches=count)))


def _space(program: Program, pins: Pins, chain: Chain, pricing: Pricing) -> Space:
    """Offload is a choice only where the lines say so."""
    offloads = pins.offloads() if pins.about("offload") else ((),)
    repeats = Repeats(chain, pricing, pins, program.budget.memory_bytes)
    return Space(program, pins, chain, pricing, repeats, offloads)


def _one_at_a_time(way: Way) -> bool:
    """One stage on a rank and backwards in one part: how much is in flight does not depend on what
    is computed again."""
    return len(way.shape.cut) == way.shape.grid.pipeline and not way.schedule.splits


def _parameters_can_leave(grid: Grid, zero: int) -> bool:
    """FSDP2 holds what leaves; it leaves alone experts that no other rank has."""
    return zero == 3 and (grid.expert == 1 or grid.data * grid.context > grid.expert)
