"""What each stage of a plan holds and how long it works, and a step as it is played.

Everything is worked out again from the program, the plan and the cost model that the search used;
what is played are the plan's own action lists, which somebody may have edited.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from llmspec.compiler.cost.memory import Ledger
from llmspec.compiler.cost.network import group, inner_groups
from llmspec.compiler.cost.offload import crossing_bytes, ledgers
from llmspec.compiler.cost.play import Event, Played
from llmspec.compiler.cost.rank import Holder
from llmspec.compiler.cost.residence import Residence
from llmspec.compiler.cost.stage import Stage
from llmspec.compiler.cost.step import Step
from llmspec.compiler.errors import Refused
from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.passes.recompute import by_instance
from llmspec.compiler.plan import Plan
from llmspec.compiler.schedules import Action, Schedule, add_sharding, rank_of
from llmspec.compiler.search.candidates import Candidate, Shape
from llmspec.compiler.search.meshes import Grid
from llmspec.compiler.search.options import TensorOption
from llmspec.compiler.search.pins import Recompute
from llmspec.compiler.search.predicted import plan_object, predicted_object
from llmspec.compiler.search.sent import collectives_of
from llmspec.compiler.search.space import Space
from llmspec.compiler.views import view_of
from llmspec.dsl import Diagnostic
from llmspec.dsl.program import Program


@dataclass(frozen=True, kw_only=True)
class Priced:
    """A plan with the space that it is a point of. stages: what each of its stages costs."""

    plan: Plan
    space: Space
    shape: Shape
    stages: tuple[Stage, ...]

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.plan.schedule)

    def step(self) -> Step:
        """The plan's own action lists, and what they are played with."""
        plan = self.plan
        return self.space.pricing.step(
            self.shape, list(self.stages), plan.zero, plan.mesh.shards, self.schedule, plan.offload
        )

    def play(self, step: Step) -> Played:
        """Errors: Refused when the plan's lists wait for each other: somebody has edited them."""
        try:
            return step.play()
        except ValueError:
            raise Refused(
                Diagnostic(
                    code="E0804",
                    message="the action lists of the plan wait for each other",
                    helps=(f"plan again: llmspec plan {self.plan.spec}",),
                )
            ) from None

    def holders(self) -> list[Holder]:
        plan = self.plan
        return self.space.pricing.holders(
            self.shape, list(self.stages), plan.zero, self.schedule, plan.offload
        )

    def home(self, holder: Holder) -> Residence:
        """What decides how long and in how many pieces things live on a rank."""
        plain = self.space.pricing.residence(self.shape, self.plan.zero, self.plan.mesh.shards)
        return holder.home(plain)

    def collectives(self, rank: int) -> list[dict[str, Any]]:
        """What each device of a pipeline rank sends in a step."""
        return collectives_of(self.space, self.candidate, list(self.stages), rank)

    def ledgers(self) -> list[Ledger]:
        """Of every pipeline rank."""
        space, offload = self.space, self.plan.offload
        return [
            ledgers(h.stage, self.home(h), space.types, space.machine, offload)[0]
            for h in self.holders()
        ]

    def crossing_bytes(self, holder: Holder) -> int:
        """Of a rank's peak, what is on its way from and to the host."""
        space, home = self.space, self.home(holder)
        return crossing_bytes(holder.stage, home, space.types, space.machine, self.plan.offload)

    @cached_property
    def candidate(self) -> Candidate:
        """The plan as a point of the space, its step played."""
        plan, space, stages = self.plan, self.space, list(self.stages)
        point = (self.shape, stages, plan.zero, plan.mesh.shards, self.schedule, plan.offload)
        memory, host = space.pricing.worst_ledger(*point)
        return Candidate(
            shape=self.shape,
            zero=plan.zero,
            shards=plan.mesh.shards,
            schedule=self.schedule,
            ledger=memory,
            times=space.pricing.times(*point, play=True),
            offload=plan.offload,
            host=host,
            recompute=by_instance(space.graph(1).instances, plan.recompute),
        )

    def blocks(self, stage: int) -> int:
        first, stop = self.shape.cut[stage]
        own = self.space.graph(1).instances[first:stop]
        return sum(bool(instance.prefix) for instance in own)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageForecast:
    """One pipeline stage: blocks it holds, the pipeline rank that runs it and that rank's memory,
    seconds of one micro-batch. late_s: of the backward, what comes later where it is split."""

    blocks: int
    memory: Ledger
    forward_s: float
    backward_s: float
    rank: int = 0
    late_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """decided, predicted: the objects of plan.json, of the plan as it stands: somebody may have
    edited it. send_s: a message between two stages. events: of one step."""

    stages: tuple[StageForecast, ...]
    send_s: float
    events: tuple[Event, ...] = ()
    decided: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)


def priced(program: Program, plan: Plan, graph: ModelGraph) -> Priced:
    """`graph`: of the plan's micro-batch. Errors: Unsupported for what has no price yet."""
    space = Space.of(program, lambda _: graph)
    shape = _shape(space, plan)
    key = (Schedule(plan.schedule), len(plan.stages), plan.mesh.pipeline)
    space.pricing.lists[*key, plan.microbatches, plan.zero] = action_lists(plan)
    stages = space.repeats.stages(shape, by_instance(graph.instances, plan.recompute))
    return Priced(plan=plan, space=space, shape=shape, stages=tuple(stages))


def action_lists(plan: Plan) -> dict[int, tuple[str, ...]]:
    """Each pipeline rank's list; without a pipeline the program takes its micro-batches in turn."""
    if plan.actions:
        return dict(enumerate(plan.actions))
    turns = [Action(0, kind, m) for m in range(plan.microbatches) for kind in ("F", "B")]
    return {0: tuple(str(action) for action in add_sharding(turns, plan.zero))}


def forecast(program: Program, plan: Plan, graph: ModelGraph) -> Forecast:
    """`graph`: of the plan's micro-batch. Errors: Unsupported for what has no price yet."""
    known = priced(program, plan, graph)
    space, step = known.space, known.step()
    events = known.play(step).events
    memory = known.ledgers()
    found = []
    for index, work in enumerate(step.works):
        rank = rank_of(known.schedule, index, plan.mesh.pipeline)
        found.append(
            StageForecast(
                blocks=known.blocks(index),
                memory=memory[rank],
                forward_s=work.forward_s,
                backward_s=work.backward_s,
                rank=rank,
                late_s=work.late_s,
            )
        )
    return Forecast(
        stages=tuple(found),
        send_s=step.send_s,
        events=events,
        decided=plan_object(space, known.candidate) | {"choices": plan.choices},
        predicted=predicted_object(space, known.candidate),
    )


def _shape(space: Space, plan: Plan) -> Shape:
    mesh = plan.mesh
    option = TensorOption(
        ranks=mesh.tensor,
        sequence=plan.sequence,
        leaning="time",
        where=group(mesh.tensor, 1, space.machine),
        inner=inner_groups(mesh.tensor, mesh.context, mesh.expert, space.machine),
        view=view_of(plan),
        placements=plan.placements,
        kernels=plan.kernels,
    )
    return Shape(
        option=option,
        grid=Grid(
            tensor=mesh.tensor,
            pipeline=mesh.pipeline,
            data=mesh.data,
            context=mesh.context,
            expert=mesh.expert,
        ),
        microbatch=plan.microbatch,
        microbatches=plan.microbatches,
        recompute=Recompute.NONE,  # each instance has its own choice
        cut=plan.stages,
    )
