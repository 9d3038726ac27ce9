"""What a rank of a plan holds, and how long its steps take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from llmspec.compiler.cost.closed import least_makespan_s, makespan_s
from llmspec.compiler.cost.data import DataCost, DataGroups, added, data_cost
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.memory import Ledger
from llmspec.compiler.cost.network import (
    axis_group,
    collective_s,
    data_group,
    expert_data_group,
    group,
    send_s,
    shards_group,
)
from llmspec.compiler.cost.offload import (
    ACTIVATIONS,
    PARAMETERS,
    HostLedger,
    Offload,
    host_cost,
    ledgers,
)
from llmspec.compiler.cost.rank import Holder, fullest, holders, run_by_ranks
from llmspec.compiler.cost.residence import Residence
from llmspec.compiler.cost.stage import Stage
from llmspec.compiler.cost.step import Step, Tail, Times, durations, stage_work, step_times, tail
from llmspec.compiler.cost.types import Types
from llmspec.compiler.placement import Collective
from llmspec.compiler.plan import MeshSizes
from llmspec.compiler.schedules import Schedule, actions, rank_of, stages_of
from llmspec.compiler.search.candidates import Shape


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed:
    """What every way to time a step begins with.

    data: of each stage. ranks, rank_data: what each rank runs, as one stage, and what that costs
    the data axes. held_s: by which a message, that takes send_s, lengthens a forward or backward.
    tied_s: of summing gradients of weights that two stages hold. tail: of a rank's stage, what it
    costs the data axes, and its share of tied_s.
    """

    stages: list[Stage]
    data: list[DataCost]
    ranks: list[Stage]
    rank_data: list[DataCost]
    send_s: float
    held_s: float
    tied_s: float
    tail: Callable[[Stage, DataCost, float], Tail]

    @property
    def spent(self) -> list[tuple[float, float]]:
        """Seconds of each stage's forward and backward, with its message."""
        both = map(durations, self.stages, self.data)
        return [(forward + self.held_s, backward + self.held_s) for forward, backward in both]

    @property
    def late_s(self) -> list[float]:
        return [stage.late_s for stage in self.stages]


@dataclass
class Pricing:
    """Stages are known by their ids: whoever makes them keeps them."""

    machine: Machine
    types: Types
    lists: dict[tuple[object, ...], dict[int, tuple[str, ...]]] = field(default_factory=dict)
    runs: dict[tuple[object, ...], list[Stage]] = field(default_factory=dict)
    held: dict[tuple[object, ...], list[Holder]] = field(default_factory=dict)
    most: dict[tuple[object, ...], list[Holder]] = field(default_factory=dict)
    meshes: dict[MeshSizes, DataGroups] = field(default_factory=dict)
    data: dict[tuple[object, ...], DataCost] = field(default_factory=dict)

    # -- memory

    def holders(
        self,
        shape: Shape,
        stages: list[Stage],
        zero: int,
        schedule: Schedule,
        offload: Offload = (),
    ) -> list[Holder]:
        """Every rank, as the ledger sees it."""
        key = self.held_key(shape, stages, zero, schedule, offload)
        if key not in self.held:
            casts = self.types.mixed and zero == 0 and not self.machine.short_weights
            cast = self.types.compute if casts else 0
            ranks, count = shape.grid.pipeline, shape.microbatches
            sums = self.sum_bytes(shape, zero)
            away = ACTIVATIONS in offload
            self.held[key] = holders(schedule, stages, ranks, count, cast, sums, away=away)
        return self.held[key]

    def held_key(
        self,
        shape: Shape,
        stages: list[Stage],
        zero: int,
        schedule: Schedule,
        offload: Offload,
    ) -> tuple[object, ...]:
        """What decides that: of ZeRO whether there is any, for then autograd does not keep weights
        as cast, and which gradients stay."""
        ids, sums = tuple(id(stage) for stage in stages), self.sum_bytes(shape, zero)
        away = ACTIVATIONS in offload
        return schedule, ids, shape.grid.pipeline, shape.microbatches, zero == 0, sums, away

    def sum_bytes(self, shape: Shape, zero: int) -> int:
        """Of each element whose gradient stays whole once it has come; 0 where they go, and where
        they have a place all the time."""
        if self.machine.short_weights or "gradients" in self.machine.fused:
            return 0
        if zero == 0:
            return self.types.gradients if shape.grid.data * shape.grid.context == 1 else 0
        return self.types.reduced if zero == 1 and shape.microbatches > 1 else 0

    def _fullest(
        self, shape: Shape, stages: list[Stage], zero: int, schedule: Schedule, offload: Offload
    ) -> list[Holder]:
        key = self.held_key(shape, stages, zero, schedule, offload)
        if key not in self.most:
            found = self.holders(shape, stages, zero, schedule, offload)
            self.most[key] = fullest(found, shape.microbatches)
        return self.most[key]

    def residence(self, shape: Shape, zero: int, shards: int) -> Residence:
        """But for what a rank has in flight."""
        plain = Residence(
            zero=zero,
            data=shape.grid.data * shape.grid.context,
            shards=shards * shape.grid.context,
            expert_shards=shape.grid.parts(zero, shards).experts,
            microbatches=shape.microbatches,
            in_flight=1,
            sends_on=False,
            whole_sums=self.machine.short_weights,
            standing="gradients" in self.machine.fused,
        )
        if zero == 0 and self.machine.short_weights:
            # what is kept is ZeRO 1's, of one rank
            return replace(plain, zero=1, shards=1, expert_shards=1)
        return plain

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
            for holder in self._fullest(shape, stages, zero, schedule, offload)
        ]
        worst = max((made for made, _ in found), key=lambda made: made.total)
        return worst, max((host for _, host in found), key=lambda host: host.total)

    # -- time

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

    def groups(self, mesh: MeshSizes) -> DataGroups:
        if mesh not in self.meshes:
            self.meshes[mesh] = DataGroups(
                shards=shards_group(mesh, self.machine),
                replicas=axis_group("replicas", mesh, self.machine),
                data=data_group(mesh, self.machine),
                experts=expert_data_group(mesh, self.machine),
            )
        return self.meshes[mesh]

    def _data_cost(
        self, stage: Stage, zero: int, microbatches: int, groups: DataGroups
    ) -> DataCost:
        key = (id(stage), zero, microbatches, groups)
        if key not in self.data:
            self.data[key] = data_cost(stage, zero, microbatches, groups, self.types, self.machine)
        return self.data[key]

    def data_costs(
        self,
        shape: Shape,
        stages: list[Stage],
        zero: int,
        shards: int,
        offload: Offload = (),
    ) -> list[DataCost]:
        groups = self.groups(shape.grid.mesh(shards))
        distinct = {id(s): s for s in stages}.values()
        made = {id(s): self._data_cost(s, zero, shape.microbatches, groups) for s in distinct}
        if ACTIVATIONS in offload or PARAMETERS in offload:
            parts = shape.grid.parts(zero, shards)
            for s in distinct:
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
        if play and len(stages) > 1:
            return self.step(shape, stages, zero, shards, schedule, offload).times()
        known = self._timed(shape, stages, zero, shards, schedule, offload)
        ranks, count = shape.grid.pipeline, shape.microbatches
        span = makespan_s(
            known.spent, count, known.send_s, schedule=schedule, ranks=ranks, late_s=known.late_s
        )
        pairs = zip(known.ranks, known.rank_data, strict=True)
        distinct = {(id(s), id(d)): (s, d) for s, d in pairs}.values()
        own, own_data = [s for s, _ in distinct], [d for _, d in distinct]
        tails = [known.tail(s, d, known.tied_s) for s, d in distinct]
        return step_times(own, own_data, tails, count, span, known.held_s * len(stages) / ranks)

    def least_s(
        self,
        shape: Shape,
        stages: list[Stage],
        zero: int,
        shards: int,
        schedule: Schedule,
        offload: Offload,
        again_s: Sequence[float],
    ) -> float:
        """No plan of these stages whose ranks compute at least so much again in each micro-batch
        has a shorter step by the closed form.

        Computing longer hides more of what a stage sends: of a backward that is no more than all
        its exposed seconds, once a step no more than that for each of its reductions.
        """
        known = self._timed(shape, stages, zero, shards, schedule, offload)
        longer = [
            max(0.0, more - d.backward_s - d.host_backward_s)
            for more, d in zip(again_s, known.rank_data, strict=True)
        ]
        count = shape.microbatches
        span = least_makespan_s(known.spent, longer, count, schedule=schedule, late_s=known.late_s)
        sums = 2 if zero == 1 else 1
        ends: dict[tuple[int, int, float], float] = {}
        for stage, cost, more in zip(known.ranks, known.rank_data, again_s, strict=True):
            key = (id(stage), id(cost), more)
            if key not in ends:
                hidden = sums * more if sums <= count else cost.last_s
                end = known.tail(stage, cost, known.tied_s)
                ends[key] = end.total - min(cost.last_s, hidden)
        return span + 2 * (len(stages) - 1) * known.send_s + max(ends.values())

    def step(
        self,
        shape: Shape,
        stages: list[Stage],
        zero: int,
        shards: int,
        schedule: Schedule,
        offload: Offload = (),
    ) -> Step:
        """Everything that a step's action lists are played with."""
        known = self._timed(shape, stages, zero, shards, schedule, offload)
        ranks, count = shape.grid.pipeline, shape.microbatches
        ends = {0, rank_of(schedule, len(stages) - 1, ranks)}
        tied = [known.tied_s if rank in ends else 0.0 for rank in range(ranks)]
        return Step(
            lists=self.action_lists(schedule, len(stages), ranks, count, zero),
            works=tuple(
                stage_work(s, d, known.held_s, splits=schedule.splits)
                for s, d in zip(stages, known.data, strict=True)
            ),
            ranks=tuple(known.ranks),
            data=tuple(known.rank_data),
            tails=tuple(map(known.tail, known.ranks, known.rank_data, tied)),
            microbatches=count,
            send_s=known.send_s,
            tied_s=known.tied_s,
            held_s=known.held_s,
        )

    def _timed(
        self,
        shape: Shape,
        stages: list[Stage],
        zero: int,
        shards: int,
        schedule: Schedule,
        offload: Offload,
    ) -> _Timed:
        data = self.data_costs(shape, stages, zero, shards, offload)
        mesh, parts = shape.grid.mesh(shards), shape.grid.parts(zero, shards)
        sending = self._message_s(stages, mesh)
        where, types, machine = shape.option.where, self.types, self.machine
        return _Timed(
            stages=stages,
            data=data,
            ranks=self.by_ranks(shape, stages, schedule),
            rank_data=self.rank_data_costs(shape, data, schedule),
            send_s=sending,
            # it holds up the kernels of its stage by what cannot overlap
            held_s=(1 - machine.overlap) * sending,
            tied_s=self.shared_weights(stages, mesh, parts.shared, schedule)[1],
            tail=lambda s, d, tied_s: tail(s, d, parts, where, tied_s, types, machine, offload),
        )

    def _message_s(self, stages: list[Stage], mesh: MeshSizes) -> float:
        message = max((s.output_bytes for s in stages[:-1]), default=0)
        return send_s(message, mesh, self.machine) if len(stages) > 1 else 0.0

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
