"""What each stage of a plan holds and how long it works, and when it does: the report's numbers.

Everything is worked out again from the program, the plan and the cost model that the search used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llmspec.compiler.cost.memory import Ledger
from llmspec.compiler.cost.network import group, inner_groups, send_s
from llmspec.compiler.cost.offload import ledgers
from llmspec.compiler.cost.stage import Stage
from llmspec.compiler.cost.step import durations
from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.passes.recompute import by_instance
from llmspec.compiler.plan import Plan
from llmspec.compiler.schedules import COMPUTES, Action, Schedule, parse_action, rank_of
from llmspec.compiler.search.candidates import Candidate, Shape
from llmspec.compiler.search.meshes import Grid
from llmspec.compiler.search.options import TensorOption
from llmspec.compiler.search.pins import Recompute
from llmspec.compiler.search.predicted import plan_object, predicted_object
from llmspec.compiler.search.space import Space
from llmspec.compiler.views import view_of
from llmspec.dsl.program import Program


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
    edited it. send_s: a message between two stages."""

    stages: tuple[StageForecast, ...]
    send_s: float
    decided: dict[str, Any] = field(default_factory=dict)
    predicted: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Event:
    """A forward ("F") or backward ("B", or its parts "I" and "W") of one micro-batch, on the rank
    of its stage."""

    rank: int
    kind: str
    microbatch: int
    start_s: float
    stop_s: float


def forecast(program: Program, plan: Plan, graph: ModelGraph) -> Forecast:
    """`graph`: of the plan's micro-batch. Errors: Unsupported for what has no price yet."""
    space = Space.of(program, lambda _: graph)
    shape = _shape(space, plan)
    stages = space.repeats.stages(shape, by_instance(graph.instances, plan.recompute))
    data = space.pricing.data_costs(shape, stages, plan.zero, plan.mesh.shards, plan.offload)
    starts = [i for i, instance in enumerate(graph.instances) if instance.prefix]
    schedule, ranks = Schedule(plan.schedule), plan.mesh.pipeline
    plain = space.pricing.residence(shape, plan.zero, plan.mesh.shards)
    memory = [
        ledgers(holder.stage, holder.home(plain), space.types, space.machine, plan.offload)[0]
        for holder in space.pricing.holders(shape, stages, plan.zero, schedule)
    ]
    found = []
    for index, (stage, cost) in enumerate(zip(stages, data, strict=True)):
        forward, backward = durations(stage, cost)
        first, stop = shape.cut[index]
        rank = rank_of(schedule, index, ranks)
        found.append(
            StageForecast(
                blocks=sum(first <= i < stop for i in starts),
                memory=memory[rank],
                forward_s=forward,
                backward_s=backward,
                rank=rank,
                late_s=stage.late_s if schedule.splits else 0.0,
            )
        )
    message = max((s.output_bytes for s in stages[:-1]), default=0)
    priced = _priced(space, plan, shape, stages)
    return Forecast(
        stages=tuple(found),
        send_s=send_s(message, plan.mesh, space.machine) if len(stages) > 1 else 0.0,
        decided=plan_object(space, priced),
        predicted=predicted_object(space, priced),
    )


def _priced(space: Space, plan: Plan, shape: Shape, stages: list[Stage]) -> Candidate:
    zero, shards, schedule = plan.zero, plan.mesh.shards, Schedule(plan.schedule)
    offload = plan.offload
    memory, host = space.pricing.worst_ledger(shape, stages, zero, shards, schedule, offload)
    return Candidate(
        shape=shape,
        zero=zero,
        shards=shards,
        schedule=schedule,
        ledger=memory,
        times=space.pricing.times(shape, stages, zero, shards, schedule, offload, play=True),
        offload=offload,
        host=host,
        recompute=by_instance(space.graph(1).instances, plan.recompute),
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


# --------------------------------------------------------------------------------------------------
# Playing the action lists


def computing(plan: Plan) -> list[list[Action]]:
    """Each pipeline rank's forwards and backwards in order; one process has them in turn."""
    if not plan.actions:
        turns = range(plan.microbatches)
        return [[Action(0, kind, m) for m in turns for kind in ("F", "B")]]
    return [[a for a in map(parse_action, row) if a.kind in COMPUTES] for row in plan.actions]


def play(lists: Sequence[Sequence[Action]], known: Forecast) -> list[Event]:
    """When each forward and backward runs: after its turn on its rank and the arrival of its input.

    Errors: ValueError when the lists wait for each other.
    """
    events: list[Event] = []
    clock = [0.0] * len(lists)
    position = [0] * len(lists)
    done: dict[Action, tuple[int, float]] = {}
    while any(p < len(own) for p, own in zip(position, lists, strict=True)):
        before = len(events)
        for rank, own in enumerate(lists):
            while position[rank] < len(own):
                action = own[position[rank]]
                ready = _ready_s(action, rank, done, known)
                if ready is None:
                    break
                event = _event(action, rank, max(clock[rank], ready), known)
                events.append(event)
                clock[rank] = event.stop_s
                made = "B" if action.kind == "I" else action.kind
                done[action._replace(kind=made)] = rank, event.stop_s
                position[rank] += 1
        if len(events) == before:
            raise ValueError("the action lists wait for themselves")
    return events


def _event(action: Action, rank: int, start_s: float, known: Forecast) -> Event:
    stage = known.stages[action.stage]
    seconds = {
        "F": stage.forward_s,
        "B": stage.backward_s,
        "I": stage.backward_s - stage.late_s,
        "W": stage.late_s,
    }
    spent = seconds[action.kind]
    assert action.microbatch is not None, "forwards and backwards have a micro-batch"
    return Event(rank, action.kind, action.microbatch, start_s, start_s + spent)


def _ready_s(
    action: Action, rank: int, done: dict[Action, tuple[int, float]], known: Forecast
) -> float | None:
    """When the input is there; None while nobody has made it."""
    if action.kind == "W":
        return 0.0
    forward = action.kind == "F"
    source = action.stage + (-1 if forward else 1)
    if not 0 <= source < len(known.stages):
        return 0.0
    made = done.get(action._replace(stage=source, kind="F" if forward else "B"))
    if made is None:
        return None
    return made[1] + (known.send_s if made[0] != rank else 0.0)
