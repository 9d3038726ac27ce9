"""The space of plans, and the price of each point of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import gcd

from llmspec.compiler.cost.closed import least_span_s, makespan_s
from llmspec.compiler.cost.data import DataCost, DataGroups, added, data_cost
from llmspec.compiler.cost.hardware import Machine, machine_of
from llmspec.compiler.cost.memory import Ledger, Residence
from llmspec.compiler.cost.network import (
    axis_group,
    collective_s,
    data_group,
    expert_data_group,
    group,
    inner_groups,
    send_s,
    shards_group,
)
from llmspec.compiler.cost.offload import (
    ACTIVATIONS,
    OPTIMIZER,
    PARAMETERS,
    HostLedger,
    Offload,
    away_bytes,
    host_cost,
    ledgers,
)
from llmspec.compiler.cost.offload import CHOICES as OFFLOADS
from llmspec.compiler.cost.rank import Holder, fullest, holders, run_by_ranks
from llmspec.compiler.cost.recompute import Again
from llmspec.compiler.cost.recompute import Operators as Recomputed
from llmspec.compiler.cost.stage import Run, Stage, together
from llmspec.compiler.cost.step import (
    Times,
    durations,
    played_s,
    step_times,
    tail,
)
from llmspec.compiler.cost.types import Types, types_of
from llmspec.compiler.cost.unit import UnitCost, resolve, unit_cost
from llmspec.compiler.graph import Instance, ModelGraph
from llmspec.compiler.passes.context import possible_styles
from llmspec.compiler.passes.experts import expert_divisor
from llmspec.compiler.placement import Collective
from llmspec.compiler.plan import EVERYTHING, MeshSizes
from llmspec.compiler.schedules import Schedule, actions, stages_of
from llmspec.compiler.search.candidates import SIMPLER, Candidate, Outline, Shape, Sketch
from llmspec.compiler.search.meshes import Grid, divisors, grids, shardings
from llmspec.compiler.search.options import Solved, TensorOption, seen_as, tensor_options
from llmspec.compiler.search.pins import Pins, Recompute
from llmspec.compiler.search.policies import Chosen, Policies, fitting
from llmspec.compiler.search.stages import (
    Cut,
    balanced,
    block_starts,
    cut_at,
    evenest,
    freed_span_s,
)
from llmspec.compiler.views import WHOLE_VIEW, View, seen
from llmspec.dsl.program import Program

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

Operators = tuple[str, ...]
"""The names of all operators of a graph."""

Build = Callable[[int], ModelGraph]
"""The model's graph for micro-batches of so many sequences."""


@dataclass
class Space:
    """All plans of one program. Costs are worked out once per part and kept."""

    program: Program
    build: Build
    pins: Pins
    types: Types
    machine: Machine
    graphs: dict[tuple[int, View], ModelGraph] = field(default_factory=dict)
    operators: dict[int, Operators] = field(default_factory=dict)
    options: dict[tuple[int, View, Operators], list[TensorOption]] = field(default_factory=dict)
    solved: Solved = field(default_factory=dict)
    cheapest: dict[tuple[int, int], float] = field(default_factory=dict)
    styles: dict[tuple[int, int, int], list[View]] = field(default_factory=dict)
    unit_costs: dict[tuple[int, int], dict[str, UnitCost]] = field(default_factory=dict)
    stages: dict[tuple[object, ...], Stage] = field(default_factory=dict)
    choices: dict[tuple[object, ...], Chosen | None] = field(default_factory=dict)
    lists: dict[tuple[object, ...], dict[int, tuple[str, ...]]] = field(default_factory=dict)
    offloads: tuple[Offload, ...] = ((),)
    """What may live in host memory, a choice a tuple."""
    besides: bool = False
    """Whether plans without offload have been looked at already."""
    host_needed: dict[int, int] = field(default_factory=dict)
    """The least host memory of a rank among the plans that had too little, by 0."""
    runs: dict[tuple[object, ...], list[Stage]] = field(default_factory=dict)
    held: dict[tuple[object, ...], list[Holder]] = field(default_factory=dict)
    known_cuts: dict[tuple[object, ...], list[Cut]] = field(default_factory=dict)
    weights: dict[tuple[object, ...], tuple[list[float], list[float]]] = field(default_factory=dict)

    @staticmethod
    def of(program: Program, build: Build) -> Space:
        """Errors: Unsupported for what cannot be priced or pinned yet."""
        types = types_of(program.train)
        machine = machine_of(program.cluster, types)
        return Space(program, build, Pins(()), types, machine).pinned(Pins.of(program))

    def pinned(self, pins: Pins) -> Space:
        """The same program under other lines. Offload is a choice only where the lines say so."""
        offloads = pins.offloads() if pins.about("offload") else ((),)
        return Space(
            self.program,
            self.build,
            pins,
            self.types,
            self.machine,
            self.graphs,
            offloads=offloads,
        )

    def with_offload(self) -> Space | None:
        """The plans besides: those that use host memory. None when the lines decide that, or the
        device's memory is the host's."""
        if self.pins.about("offload") or self.offloads != ((),) or not self.machine.pinned:
            return None
        return replace(self, offloads=OFFLOADS, besides=True)

    @property
    def host_bytes(self) -> int:
        """Host memory of one rank."""
        cluster, budget = self.program.cluster, self.program.budget
        here = min(cluster.devices_per_node, cluster.world_size)
        return (budget.host_memory_bytes or cluster.host_memory_bytes) // here

    @property
    def budget_bytes(self) -> int:
        return self.program.budget.memory_bytes

    def graph(self, microbatch: int, view: View = WHOLE_VIEW) -> ModelGraph:
        """What one rank sees of the model, for micro-batches of so many sequences."""
        key = (microbatch, view)
        if key not in self.graphs:
            whole = self.build(microbatch) if view == WHOLE_VIEW else self.graph(microbatch)
            self.graphs[key] = seen(whole, view)
        return self.graphs[key]

    @cached_property
    def instances(self) -> tuple[Instance, ...]:
        return self.graph(1).instances

    @cached_property
    def blocks(self) -> int:
        return len(block_starts(self.graph(1)))

    # -- enumeration

    def grids(self) -> list[Grid]:
        cluster, graph = self.program.cluster, self.graph(1)
        fewest = 1 if self.pins.about("context") else FEWEST_TOKENS
        sharing = (
            n
            for n in divisors(cluster.world_size)
            if n > 1 and graph.tokens >= n * fewest and possible_styles(graph, n)
        )
        return list(
            grids(
                cluster.world_size,
                cluster.devices_per_node,
                self.blocks,
                self.pins,
                contexts=(1, *sharing),
                experts=expert_divisor(graph),
            )
        )

    def views(self, grid: Grid) -> list[View]:
        """Styles that are slower than another and keep no less are left out."""
        if grid.context == 1:
            return [View(expert=grid.expert)]
        key = (grid.tensor, grid.context, grid.expert)
        if key not in self.styles:
            styles = possible_styles(self.graph(1), grid.context)
            found = [
                View(context=grid.context, style=style, expert=grid.expert)
                for style in styles
                if self.pins.allows("context_style", style)
            ]
            self.styles[key] = found if len(found) < 2 else self._worth_having(grid.tensor, found)
        return self.styles[key]

    def _worth_having(self, tensor: int, views: list[View]) -> list[View]:
        priced = []
        for view in views:
            options = self.tensor_options(tensor, 1, view)
            whole = [self._whole(option, 1, Recompute.NONE) for option in options]
            least_s = min((w.busy_s for w in whole), default=float("inf"))
            priced.append((least_s, min((w.kept_bytes(0) for w in whole), default=0), view))
        priced.sort(key=lambda p: p[:2])
        kept: list[tuple[float, int, View]] = []
        for one in priced:
            if not any(other[1] <= one[1] for other in kept):
                kept.append(one)
        return [view for _, _, view in kept]

    def tensor_options(self, ranks: int, microbatch: int, view: View) -> list[TensorOption]:
        """Placements are found at one sequence, and serve every micro-batch whose graph has the
        same operators; a traced model may have others at one sequence."""
        size = 1 if self._operators(microbatch) == self._operators(1) else microbatch
        key = (ranks, view, self._operators(size))
        if key not in self.options:
            sequences = [s for s in (False, True) if self.pins.allows("sequence", s)]
            graph = self.graph(size, view)
            found = []
            like = self._placed_like(ranks, view)
            if like != view:
                known = self.tensor_options(ranks, size, like)
                found = [o for o in (seen_as(k, graph, view, self.machine) for k in known) if o]
            if not found:
                found = tensor_options(
                    graph, ranks, sequences, self.machine, self.types, view, self.solved
                )
            if ranks == 1 and not self.pins.allows("sequence", False):
                found = []
            self.options[key] = found
        return self.options[key]

    def _placed_like(self, ranks: int, view: View) -> View:
        """The view whose placements serve this one: without context ranks, and of the numbers of
        expert ranks that use the same wires the smallest."""
        if view.expert == 1:
            return WHOLE_VIEW

        def crosses(context: int, expert: int) -> bool:
            return inner_groups(ranks, context, expert, self.machine)["expert"].crosses_nodes

        wires = crosses(view.context, view.expert)
        counts = [n for n in divisors(view.expert) if n > 1 and crosses(1, n) == wires]
        return View(expert=counts[0]) if counts else replace(view, context=1, style=None)

    def _operators(self, microbatch: int) -> Operators:
        if microbatch not in self.operators:
            units = self.graph(microbatch).units.values()
            self.operators[microbatch] = tuple(n.name for unit in units for n in unit.calls())
        return self.operators[microbatch]

    def recomputes(self) -> list[Recompute]:
        """What blocks may do; what stands alone never computes again."""
        allowed = self.pins.recompute()
        if Recompute.SELECTIVE in allowed:
            # what it comes to when nothing less fits
            allowed = tuple(kind for kind in allowed if kind is not Recompute.FULL)
        alone = not any(i.prefix for i in self.instances)
        return [Recompute.NONE] if alone and Recompute.NONE in allowed else list(allowed)

    @cached_property
    def policies(self) -> Policies:
        return Policies(self.graph, self.machine, self.types)

    def agains(
        self, option: TensorOption, microbatch: int, start: int, operators: Chosen
    ) -> tuple[Again | None, ...]:
        """The prices of what instances from `start` on compute again."""
        own = self.instances[start : start + len(operators)]
        again = self.policies.again
        return tuple(
            again(option, microbatch, i.unit, o) for i, o in zip(own, operators, strict=True)
        )

    def alike(
        self, option: TensorOption, microbatch: int, recompute: Recompute, start: int, stop: int
    ) -> Chosen:
        """What instances compute again where all blocks do the same; nothing where each has its
        own choice."""
        by_unit: dict[str, Recomputed] = {}
        for instance in self.instances[start:stop]:
            name = instance.unit
            if instance.prefix and name not in by_unit:
                by_unit[name] = self._of_each(option, microbatch, recompute, name)
        own = self.instances[start:stop]
        return tuple(by_unit.get(i.unit, ()) if i.prefix else () for i in own)

    def _of_each(
        self, option: TensorOption, microbatch: int, recompute: Recompute, name: str
    ) -> Recomputed:
        match recompute:
            case Recompute.FULL:
                return EVERYTHING
            case Recompute.LISTED:
                names = self.pins.recomputed_operators()
                return self.policies.listed(option, microbatch, name, names)
            case _:
                return ()

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

    def interleaves(self, pipeline: int) -> list[int]:
        """Stages on each rank."""
        pinned = self.pins.stage_blocks()
        tried = [v for v in range(1, self.blocks // pipeline + 1) if v in INTERLEAVES]
        if self.pins.about("interleave") or pinned is not None:
            tried = list(range(1, self.blocks // pipeline + 1))
        if pipeline == 1:
            tried = [1]
        if pinned is not None:
            tried = [v for v in tried if v * pipeline == len(pinned)]
        return self.pins.allowed("interleave", tried)

    def schedules(self, pipeline: int, interleave: int = 1) -> list[Schedule]:
        if pipeline == 1:
            return [Schedule.ONE_F_ONE_B]
        fitting = [s for s in SIMPLER if s.allows(interleave)]
        if self.pins.about("schedule"):
            return [s for s in fitting if self.pins.allows("schedule", str(s))]
        return [s for s in fitting if (s, interleave) not in ONLY_PINNED]

    # -- prices

    def costs(self, option: TensorOption, microbatch: int) -> dict[str, UnitCost]:
        key = (id(option), microbatch)
        if key not in self.unit_costs:
            self.unit_costs[key] = {
                name: unit_cost(
                    unit,
                    resolve(unit, option.placements[name], option.ranks),
                    option.where,
                    self.machine,
                    self.types.compute,
                    option.inner,
                )
                for name, unit in self.graph(microbatch, option.view).units.items()
            }
        return self.unit_costs[key]

    def cuts(self, outline: Outline, interleave: int = 1) -> list[Cut]:
        """The fastest cut; with one stage on each rank also one that evens out what 1F1B's stages
        hold. Several are so small that their ranks hold much the same."""
        pipeline = outline.grid.pipeline
        graph = self.graph(1)
        if pipeline == 1:
            return [((0, len(graph.instances)),)]
        pinned = self.pins.stage_blocks()
        if pinned is not None:
            return [cut_at(graph, pinned)] if sum(pinned) == self.blocks else []
        known = (id(outline.option), outline.microbatch, outline.recompute)
        key = (*known, pipeline, interleave)
        if key in self.known_cuts:
            return self.known_cuts[key]
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
        key = (id(option), size, outline.recompute)
        if key in self.weights:
            return self.weights[key]
        starts = block_starts(self.graph(1))
        stops = [*starts[1:], len(self.instances)]
        times, held = [], []
        for start, stop in zip(starts, stops, strict=True):
            chosen = self.alike(option, size, outline.recompute, start, stop)
            stage = self._stage_of(option, size, chosen, start, pipeline=2)
            times.append(stage.busy_s)
            held.append(float(stage.kept_bytes(0)))
        self.weights[key] = times, held
        return times, held

    def stage(self, shape: Shape, start: int, stop: int) -> Stage:
        units = self.instances[start:stop]
        pipeline = shape.grid.pipeline
        names = tuple(i.unit for i in units)
        key = (id(shape.option), shape.microbatch, shape.recompute, names, pipeline == 1)
        if key not in self.stages:
            option, size = shape.option, shape.microbatch
            chosen = self.alike(option, size, shape.recompute, start, stop)
            self.stages[key] = self._stage_of(option, size, chosen, start, pipeline)
        return self.stages[key]

    def stages_of(self, shape: Shape, chosen: Chosen) -> list[Stage]:
        """The stages of a shape whose instances compute again what is chosen for each."""
        made = []
        for start, stop in shape.cut:
            own, pipeline = chosen[start:stop], shape.grid.pipeline
            names = tuple(i.unit for i in self.instances[start:stop])
            key = (id(shape.option), shape.microbatch, own, names, pipeline == 1)
            if key not in self.stages:
                option, size = shape.option, shape.microbatch
                self.stages[key] = self._stage_of(option, size, own, start, pipeline)
            made.append(self.stages[key])
        return made

    def _stage_of(
        self, option: TensorOption, microbatch: int, chosen: Chosen, start: int, pipeline: int
    ) -> Stage:
        costs = self.costs(option, microbatch)
        agains = self.agains(option, microbatch, start, chosen)
        tied = any(c.tied_elements for c in costs.values())
        runs: list[Run] = []
        before: tuple[object, ...] = ()
        last = len(self.instances) - 1
        for index, again in enumerate(agains, start):
            instance, block = self.instances[index], 0 < index < last
            own = bool(instance.prefix) or pipeline > 1 or not tied
            kind = (instance.unit, id(again), own, block)
            if kind == before:
                runs[-1] = Run(runs[-1].cost, runs[-1].count + 1, again, own, block)
            else:
                runs.append(Run(costs[instance.unit], 1, again, own, block))
            before = kind
        copies = sum(r.cost.tied_elements * r.count for r in runs) if pipeline > 1 else 0
        return Stage(tuple(runs), copies)

    def mesh(self, grid: Grid, shards: int) -> MeshSizes:
        return MeshSizes(
            pipeline=grid.pipeline,
            replicas=grid.data // shards,
            shards=shards,
            context=grid.context,
            expert=grid.expert,
            tensor=grid.tensor,
        )

    def holders(
        self, shape: Shape, stages: list[Stage], zero: int, schedule: Schedule
    ) -> list[Holder]:
        """Every rank, as the ledger sees it."""
        cast = self.types.compute if self.types.mixed and zero == 0 else 0
        return holders(schedule, stages, shape.grid.pipeline, shape.microbatches, cast)

    def _fullest(
        self, shape: Shape, stages: list[Stage], zero: int, schedule: Schedule
    ) -> list[Holder]:
        ids = tuple(id(stage) for stage in stages)
        key = (schedule, ids, shape.grid.pipeline, shape.microbatches, zero == 0)
        if key not in self.held:
            self.held[key] = fullest(self.holders(shape, stages, zero, schedule))
        return self.held[key]

    def residence(self, shape: Shape, zero: int, shards: int) -> Residence:
        """But for what a rank has in flight."""
        return Residence(
            zero=zero,
            data=shape.grid.data * shape.grid.context,
            shards=shards * shape.grid.context,
            expert_shards=shape.grid.parts(zero, shards).experts,
            microbatches=shape.microbatches,
            in_flight=1,
            sends_on=False,
        )

    def worst_ledger(
        self,
        shape: Shape,
        stages: list[Stage],
        zero: int,
        shards: int,
        schedule: Schedule,
        offload: Offload = (),
    ) -> tuple[Ledger, HostLedger]:
        """Of the fullest rank, and of the one with most in host memory. Ranks with equal stages
        differ by what is in flight."""
        plain = self.residence(shape, zero, shards)
        found = [
            ledgers(holder.stage, holder.home(plain), self.types, self.machine, offload)
            for holder in self._fullest(shape, stages, zero, schedule)
        ]
        worst = max((made for made, _ in found), key=lambda made: made.total)
        return worst, max((host for _, host in found), key=lambda host: host.total)

    def by_ranks(self, shape: Shape, stages: list[Stage], schedule: Schedule) -> list[Stage]:
        """What each rank runs, as one stage."""
        if len(stages) == shape.grid.pipeline:
            return stages
        key = (tuple(id(s) for s in stages), shape.grid.pipeline, schedule.turns)
        if key not in self.runs:
            self.runs[key] = run_by_ranks(schedule, stages, shape.grid.pipeline)
        return self.runs[key]

    def rank_data_costs(
        self, shape: Shape, data: list[DataCost], schedule: Schedule
    ) -> list[DataCost]:
        """What each rank's stages cost the data axes."""
        ranks = shape.grid.pipeline
        if len(data) == ranks:
            return data
        made: dict[tuple[int, ...], DataCost] = {}
        found = []
        for rank in range(ranks):
            own = [data[s] for s in stages_of(schedule, rank, len(data), ranks)]
            key = tuple(map(id, own))
            if key not in made:
                made[key] = added(own)
            found.append(made[key])
        return found

    def data_costs(
        self,
        shape: Shape,
        stages: list[Stage],
        zero: int,
        shards: int,
        offload: Offload = (),
    ) -> list[DataCost]:
        mesh = self.mesh(shape.grid, shards)
        groups = DataGroups(
            shards=shards_group(mesh, self.machine),
            replicas=axis_group("replicas", mesh, self.machine),
            data=data_group(mesh, self.machine),
            experts=expert_data_group(mesh, self.machine),
        )
        made = {
            id(s): data_cost(s, zero, shape.microbatches, groups, self.types, self.machine)
            for s in {id(s): s for s in stages}.values()
        }
        if offload:
            parts = shape.grid.parts(zero, shards)
            for s in {id(s): s for s in stages}.values():
                link = host_cost(s, groups, parts, self.types, self.machine, offload)
                made[id(s)] = replace(made[id(s)], host_forward_s=link[0], host_backward_s=link[1])
        return [made[id(s)] for s in stages]

    def times(
        self,
        shape: Shape,
        stages: list[Stage],
        zero: int,
        shards: int,
        schedule: Schedule,
        offload: Offload = (),
        *,
        play: bool,
    ) -> Times:
        """`play`: the schedule's own action lists instead of the closed form."""
        data = self.data_costs(shape, stages, zero, shards, offload)
        mesh = self.mesh(shape.grid, shards)
        parts = shape.grid.parts(zero, shards)
        spent = [durations(s, d) for s, d in zip(stages, data, strict=True)]
        late = [s.late_s for s in stages]
        message = max((s.output_bytes for s in stages[:-1]), default=0)
        sending = send_s(message, mesh, self.machine) if len(stages) > 1 else 0.0
        ranks, count = mesh.pipeline, shape.microbatches
        # a message holds up the kernels of its stage by what cannot overlap
        held = (1 - self.machine.send_overlap) * sending
        spent = [(f + held, b + held) for f, b in spent]
        if play and len(stages) > 1:
            lists = self.action_lists(schedule, len(stages), ranks, count, zero)
            span = played_s(lists, spent, sending, late)
        else:
            span = makespan_s(spent, count, sending, schedule=schedule, ranks=ranks, late_s=late)
        shared = self.shared_weights(stages, mesh, parts.shared, schedule)
        own = self.by_ranks(shape, stages, schedule)
        own_data = self.rank_data_costs(shape, data, schedule)
        distinct = {(id(s), id(d)): (s, d) for s, d in zip(own, own_data, strict=True)}
        own, own_data = [s for s, _ in distinct.values()], [d for _, d in distinct.values()]
        where = shape.option.where
        tails = [
            tail(s, d, parts, where, shared[1], self.types, self.machine, offload)
            for s, d in zip(own, own_data, strict=True)
        ]
        held *= len(stages) / ranks
        return step_times(own, own_data, tails, count, span, held)

    def shared_weights(
        self, stages: list[Stage], mesh: MeshSizes, parts: int, schedule: Schedule
    ) -> tuple[int, float]:
        """(bytes, seconds) of summing the gradients of weights that two stages hold. In a V the
        ends of the chain are one rank's."""
        elements = max(s.tied_elements for s in stages)
        size = self.types.reduced * -(-elements // parts)
        if schedule.turns:
            return 0, 3 * size / self.machine.memory_bytes_per_s
        pair = group(2, mesh.world_size // mesh.pipeline, self.machine)
        return size, collective_s(Collective.ALL_REDUCE, size, pair)

    def action_lists(
        self, schedule: Schedule, stages: int, ranks: int, microbatches: int, zero: int
    ) -> dict[int, tuple[str, ...]]:
        key = (schedule, stages, ranks, microbatches, zero)
        if key not in self.lists:
            self.lists[key] = actions(schedule, stages, ranks, microbatches, zero)
        return self.lists[key]

    # -- candidates

    def sketches(self) -> list[Sketch]:
        """Every mesh and micro-batch. What a view costs is bounded by the whole model: the same
        work in smaller pieces, and what is sent besides."""
        return [
            self._sketch(Sketch(grid=grid, view=view, microbatch=size, microbatches=count))
            for grid in self.grids()
            for size, count in self.microbatches(grid)
            for view in self.views(grid)
        ]

    def _sketch(self, sketch: Sketch) -> Sketch:
        """Bounds of bytes from the costs of one sequence: what is kept grows with the micro-batch.
        Without context ranks there is none of seconds: fewer experts on a rank are less work."""
        whole = replace(sketch, view=View(expert=sketch.grid.expert))
        least_bytes = self._least_bytes(whole)
        if least_bytes > self.budget_bytes or sketch.view.context == 1:
            return replace(sketch, least_bytes=least_bytes)
        least_s = min((o.least_s for o in self.opened(whole)), default=0.0)
        return replace(sketch, least_s=least_s / sketch.grid.context, least_bytes=least_bytes)

    def _least_bytes(self, sketch: Sketch) -> float:
        bounds = []
        for option in self.tensor_options(sketch.grid.tensor, 1, sketch.view):
            for recompute in self.recomputes():
                whole = self._fewest(option, 1, recompute)
                kept = sketch.microbatch * self._least_kept(whole)[1] / sketch.grid.context
                bounds.append(self._bytes_bound(sketch, whole, kept))
        return min(bounds, default=0.0)

    def _fewest(self, option: TensorOption, microbatch: int, recompute: Recompute) -> Stage:
        """The chain as one stage that keeps no more than any choice of `recompute`."""
        full = Recompute.FULL if recompute is Recompute.SELECTIVE else recompute
        return self._whole(option, microbatch, full)

    def _bytes_bound(self, sketch: Sketch, whole: Stage, kept: float) -> float:
        """No plan's peak is lower. `kept`: of one micro-batch in all stages."""
        grid = sketch.grid
        elements = whole.elements + (grid.expert - 1) * whole.expert_elements
        stored = self._least_kept(whole)[0] * elements / (grid.data * grid.context)
        flying = evenest(stored, kept, grid.pipeline, sketch.microbatches)
        return self.machine.fixed_bytes + flying

    def opened(self, sketch: Sketch) -> list[Outline]:
        return [
            self._outline(sketch, option, recompute)
            for option in self.tensor_options(sketch.grid.tensor, sketch.microbatch, sketch.view)
            for recompute in self.recomputes()
        ]

    def outlines(self) -> list[Outline]:
        """Every one, the most promising first."""
        found = [outline for sketch in self.sketches() for outline in self.opened(sketch)]
        return sorted(found, key=lambda o: o.least_s)

    def _outline(self, sketch: Sketch, option: TensorOption, recompute: Recompute) -> Outline:
        """The bounds are those of equal stages: the worst one is no better than their mean."""
        grid, microbatch, microbatches = sketch.grid, sketch.microbatch, sketch.microbatches
        whole = self._whole(option, microbatch, recompute)
        fewest = self._fewest(option, microbatch, recompute)
        of_one, kept = self._least_kept(fewest)
        fixed = self.machine.fixed_bytes
        return Outline(
            option=option,
            grid=grid,
            microbatch=microbatch,
            microbatches=microbatches,
            recompute=recompute,
            least_s=max(
                self._even_span_s(whole, grid.pipeline, microbatches),
                self._freed_span_s(sketch, option, recompute, whole),
            ),
            least_bytes=self._bytes_bound(sketch, whole, kept),
            least_whole_bytes=fixed + (of_one * whole.elements + kept) / grid.pipeline,
            busy_s=whole.busy_s,
            late_s=whole.late_s,
        )

    def _even_span_s(self, whole: Stage, pipeline: int, microbatches: int) -> float:
        """No cut under any schedule has a shorter step."""
        if pipeline == 1:
            return microbatches * whole.busy_s
        spans = [
            least_span_s(
                whole.busy_s,
                whole.late_s,
                microbatches,
                schedule=schedule,
                ranks=pipeline,
                interleave=interleave,
            )
            for interleave, schedules in self.ways(pipeline, microbatches)
            for schedule in schedules
        ]
        # the sums of floats are in another order there
        return (1 - 1e-9) * min(spans, default=0.0)

    def _freed_span_s(
        self, sketch: Sketch, option: TensorOption, recompute: Recompute, whole: Stage
    ) -> float:
        """No plan that computes again what does not fit has a shorter step."""
        if recompute is not Recompute.SELECTIVE or any(ACTIVATIONS in o for o in self.offloads):
            return 0.0
        grid = sketch.grid
        elements = whole.elements + (grid.expert - 1) * whole.expert_elements
        stored = self._least_kept(whole)[0] * elements / (grid.data * grid.context)
        return freed_span_s(
            busy_s=whole.busy_s,
            kept=whole.kept_bytes(0),
            stored=stored,
            budget=self.budget_bytes - self.machine.fixed_bytes,
            s_per_byte=self._cheapest_s(option, sketch.microbatch),
            pipeline=grid.pipeline,
            microbatches=sketch.microbatches,
        )

    def _cheapest_s(self, option: TensorOption, microbatch: int) -> float:
        """Seconds of computing again for each byte that is not kept, at the least."""
        key = (id(option), microbatch)
        if key not in self.cheapest:
            costs = self.costs(option, microbatch)
            names = dict.fromkeys(i.unit for i in self.instances if i.prefix)
            self.cheapest[key] = min(
                (
                    again.whole_s / (costs[name].saved_bytes - again.kept_bytes)
                    for name in names
                    for again in self.policies.choices(option, microbatch, name)
                    if again.kept_bytes < costs[name].saved_bytes
                ),
                default=0.0,
            )
        return self.cheapest[key]

    def sharded_bytes(self, outline: Outline, zero: int, shards: int) -> float:
        """No plan of the outline that shards so has a lower peak."""
        grid, types = outline.grid, self.types
        whole = self._fewest(outline.option, outline.microbatch, outline.recompute)
        of_one, kept = self._least_kept(whole)
        part = grid.parts(zero, shards).largest(whole.elements, whole.expert_elements)
        stored = of_one * part
        if not any(PARAMETERS in o for o in self.offloads):
            summed = zero == 0 and grid.data * grid.context > 1
            summed |= zero == 1 and outline.microbatches > 1
            shared = whole.elements - whole.expert_elements
            stored += types.gradients * (shared if summed else part if zero else 0)
            stored += types.compute * shared if zero in (1, 2) else 0
        return self.machine.fixed_bytes + evenest(stored, kept, grid.pipeline, outline.microbatches)

    def _least_kept(self, whole: Stage) -> tuple[int, int]:
        """(bytes of a weight and its optimizer, bytes of activations) that no choice of what to
        offload brings lower."""
        away = any(OPTIMIZER in o or PARAMETERS in o for o in self.offloads)
        moments = 0 if away else self.types.moments
        weights = 0 if any(PARAMETERS in o for o in self.offloads) else self.types.weights
        kept = whole.kept_bytes(0)
        if any(ACTIVATIONS in o for o in self.offloads):
            kept -= sum(run.count * away_bytes(run) for run in whole.runs)
        return weights + moments, kept

    def _whole(self, option: TensorOption, microbatch: int, recompute: Recompute) -> Stage:
        """The chain as one stage, all blocks alike."""
        key = (id(option), microbatch, recompute)
        if key not in self.stages:
            instances = len(self.instances)
            chosen = self.alike(option, microbatch, recompute, 0, instances)
            self.stages[key] = self._stage_of(option, microbatch, chosen, 0, pipeline=1)
        return self.stages[key]

    def shapes(self, outline: Outline, interleave: int = 1) -> list[Shape]:
        cuts = self.cuts(outline, interleave)
        return [
            Shape(
                option=outline.option,
                grid=outline.grid,
                microbatch=outline.microbatch,
                microbatches=outline.microbatches,
                recompute=outline.recompute,
                cut=cut,
            )
            for cut in cuts
        ]

    def least_s(self, outline: Outline, interleave: int, schedule: Schedule) -> float:
        """No plan of an outline that does this has a shorter step."""
        ranks = outline.grid.pipeline
        span = least_span_s(
            outline.busy_s,
            outline.late_s,
            outline.microbatches,
            schedule=schedule,
            ranks=ranks,
            interleave=interleave,
        )
        # the sums of floats are in another order there
        return max(outline.least_s, (1 - 1e-9) * span)

    def ways(self, pipeline: int, microbatches: int) -> Iterator[tuple[int, list[Schedule]]]:
        """Stages on each rank, and the schedules that may then be."""
        for interleave in self.interleaves(pipeline):
            found = self.schedules(pipeline, interleave)
            if found:
                yield interleave, found

    def candidates(self, outline: Outline) -> Iterator[Candidate]:
        """Every plan of an outline; those that do not fit have no times. Where each block has its
        own choice, the fastest choice that fits; no plan where nothing needs to be computed
        again, unless the spec asks for it."""
        for interleave, schedules in self.ways(outline.grid.pipeline, outline.microbatches):
            yield from self.candidates_of(outline, interleave, schedules)

    def candidates_of(
        self,
        outline: Outline,
        interleave: int,
        schedules: list[Schedule],
        skip: Callable[[int, int], bool] = lambda zero, shards: False,
    ) -> Iterator[Candidate]:
        """Those with so many stages on a rank, and under these schedules. `skip`: which (zero,
        shards) are not worth a price."""
        sharings = [way for way in shardings(outline.grid, self.pins) if not skip(*way)]
        for shape in self.shapes(outline, interleave) if sharings and schedules else ():
            for zero, shards in sharings:
                for schedule in schedules:
                    yield from self._candidates(shape, zero, shards, schedule)

    def _candidates(
        self, shape: Shape, zero: int, shards: int, schedule: Schedule
    ) -> Iterator[Candidate]:
        """With each use of host memory. What adds one to a plan that fits is slower."""
        fitting: list[Offload] = []
        for offload in self.offloads:
            if any(set(o) < set(offload) for o in fitting):
                continue
            if PARAMETERS in offload and not self._parameters_can_leave(shape.grid, zero):
                continue
            chosen = self.chosen(shape, zero, shards, schedule, offload)
            if chosen is None:
                continue
            found = self._candidate(shape, chosen, zero, shards, schedule, offload)
            if found is None:
                continue
            if found.times is not None:
                fitting.append(offload)
            if offload or not self.besides:
                yield found

    def _parameters_can_leave(self, grid: Grid, zero: int) -> bool:
        """FSDP2 holds what leaves; it leaves alone experts that no other rank has."""
        return zero == 3 and (grid.expert == 1 or grid.data * grid.context > grid.expert)

    def chosen(
        self, shape: Shape, zero: int, shards: int, schedule: Schedule, offload: Offload
    ) -> Chosen | None:
        """What every instance computes again; None where nothing need be."""
        count = len(self.instances)
        option, size = shape.option, shape.microbatch
        if shape.recompute is not Recompute.SELECTIVE:
            return self.alike(option, size, shape.recompute, 0, count)
        some = Recompute.NONE not in self.pins.recompute()
        bare = [self.stage(shape, a, b) for a, b in shape.cut]
        plain = self.residence(shape, zero, shards)
        out: list[Recomputed] = [()] * count
        for rank, holder in enumerate(self.holders(shape, bare, zero, schedule)):
            mine = stages_of(schedule, rank, len(bare), shape.grid.pipeline)
            spans = tuple(shape.cut[s] for s in mine)
            found = self._for_rank(shape, spans, holder, holder.home(plain), offload, some)
            if found is None:  # nothing fits
                return self.alike(option, size, Recompute.FULL, 0, count)
            places = [i for a, b in spans for i in range(a, b)]
            for place, own in zip(places, found, strict=True):
                out[place] = own
        return tuple(out) if any(out) else None

    def _for_rank(
        self,
        shape: Shape,
        spans: Cut,
        holder: Holder,
        home: Residence,
        offload: Offload,
        some: bool,
    ) -> Chosen | None:
        """The fastest choice for the instances of a rank's stages that fits; None when none
        does."""
        own = [i for a, b in spans for i in self.instances[a:b]]
        names = tuple(tuple(i.unit for i in self.instances[a:b]) for a, b in spans)
        alone = shape.grid.pipeline == 1
        key = (id(shape.option), shape.microbatch, names, alone, home, offload, some)
        if key not in self.choices:
            self.choices[key] = fitting(
                self.policies,
                shape.option,
                shape.microbatch,
                holder.stage,
                tuple(i.unit if i.prefix else "" for i in own),
                home,
                offload=offload,
                budget_bytes=self.budget_bytes,
                some=some,
                make=lambda chosen: self._together(shape, spans, chosen),
            )
        return self.choices[key]

    def _together(self, shape: Shape, spans: Cut, chosen: Chosen) -> Stage:
        """A rank's stages with a choice for each of their instances."""
        made, place = [], 0
        for start, stop in spans:
            part, place = chosen[place : place + stop - start], place + stop - start
            option, size = shape.option, shape.microbatch
            made.append(self._stage_of(option, size, part, start, shape.grid.pipeline))
        return together(made)

    def smallest_of(self, outline: Outline) -> Iterator[Candidate]:
        """Of each ZeRO level the plan that shards most, for what cannot fit anyway."""
        for interleave, schedules in list(self.ways(outline.grid.pipeline, outline.microbatches))[
            :1
        ]:
            for shape in self.shapes(outline, interleave)[-1:]:
                for zero, shards in dict(shardings(outline.grid, self.pins)).items():
                    yield from self._candidates(shape, zero, shards, schedules[0])

    def _candidate(
        self,
        shape: Shape,
        chosen: Chosen,
        zero: int,
        shards: int,
        schedule: Schedule,
        offload: Offload,
    ) -> Candidate | None:
        """None when the host has no memory for it."""
        stages = self.stages_of(shape, chosen)
        memory, host = self.worst_ledger(shape, stages, zero, shards, schedule, offload)
        if host.total > self.host_bytes:
            least = min(host.total, self.host_needed.get(0, host.total))
            self.host_needed[0] = least
            return None
        times = None
        if memory.total <= self.budget_bytes:
            times = self.times(shape, stages, zero, shards, schedule, offload, play=False)
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
        )

    def played(self, candidate: Candidate) -> Candidate:
        """The same plan, its time taken from its action lists."""
        shape = candidate.shape
        stages = self.stages_of(shape, candidate.recompute)
        times = self.times(
            shape,
            stages,
            candidate.zero,
            candidate.shards,
            candidate.schedule,
            candidate.offload,
            play=True,
        )
        return replace(candidate, times=times)
