"""The time of one optimizer step, in parts that sum to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from llmspec.compiler.cost.data import DataCost
from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.network import Group, collective_s
from llmspec.compiler.cost.offload import Offload, update_s
from llmspec.compiler.cost.play import play_s
from llmspec.compiler.cost.stage import Parts, Stage
from llmspec.compiler.cost.types import Types
from llmspec.compiler.placement import Collective


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Exposed seconds of one step."""

    compute: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    data: float = 0.0
    pipeline_bubble: float = 0.0
    pipeline_transfer: float = 0.0
    optimizer: float = 0.0
    offload: float = 0.0

    @property
    def total(self) -> float:
        communicated = self.tensor + self.context + self.expert + self.data
        waited = self.pipeline_bubble + self.pipeline_transfer + self.offload
        return self.compute + communicated + waited + self.optimizer

    def parts(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What a stage does once a step, beside its micro-batches."""

    data_s: float
    tensor_s: float
    optimizer_s: float
    offload_s: float = 0.0

    @property
    def total(self) -> float:
        return self.data_s + self.tensor_s + self.optimizer_s + self.offload_s


def optimizer_s(elements: int, types: Types, machine: Machine) -> float:
    """Gradients are read for clipping and again by the update; weights and moments read and
    written."""
    stored = 2 * types.gradients + 2 * types.weights + 2 * types.moments
    moved = elements * (machine.optimizer_bytes or stored + types.scratch)
    return moved / machine.memory_bytes_per_s + 4 * machine.launch_s


def tail(
    stage: Stage,
    data: DataCost,
    parts: Parts,
    tensor: Group,
    shared_s: float,
    types: Types,
    machine: Machine,
    offload: Offload = (),
) -> Tail:
    """`parts`: into which ZeRO cuts the optimizer's state. `shared_s`: of summing gradients of
    weights that two stages hold."""
    shadow = parts.largest(stage.shadow_elements, stage.expert_shadow_elements)
    held = parts.largest(stage.elements, stage.expert_elements)
    on_host = update_s(held, types, machine, offload)
    update, link = on_host or (optimizer_s(held, types, machine), 0.0)
    return Tail(
        data_s=data.first_s + data.last_s + shared_s,
        tensor_s=collective_s(Collective.ALL_REDUCE, types.reduced * shadow, tensor),
        optimizer_s=update,
        offload_s=link,
    )


def durations(stage: Stage, data: DataCost) -> tuple[float, float]:
    """Seconds of one micro-batch's forward and backward on a stage."""
    return (
        stage.whole_forward_s + data.forward_s + data.host_forward_s,
        stage.whole_backward_s + data.backward_s + data.host_backward_s,
    )


def played_s(
    lists: Mapping[int, Sequence[str]],
    spent: Sequence[tuple[float, float]],
    send_s: float,
    late_s: Sequence[float] = (),
) -> tuple[float, float]:
    """What `makespan_s` gives, from the very action lists that the runtime executes."""
    forward, backward = [f for f, _ in spent], [b for _, b in spent]
    bare = play_s(lists, forward, backward, 0.0, late_s)
    return bare, play_s(lists, forward, backward, send_s, late_s) - bare


def step_times(
    stages: Sequence[Stage],
    data: Sequence[DataCost],
    tails: Sequence[Tail],
    microbatches: int,
    span: tuple[float, float],
    held_s: float = 0.0,
) -> Times:
    """`held_s`: by which each message lengthens a forward or a backward. `span`: what `makespan_s`
    or `played_s` gave, with it. The parts are those of the busiest stage; what
    it waits for is the bubble."""
    spent = [sum(durations(s, d)) for s, d in zip(stages, data, strict=True)]
    busiest = max(range(len(stages)), key=lambda i: spent[i])
    stage, cost = stages[busiest], data[busiest]
    end = max(tails, key=lambda t: t.total)
    return Times(
        compute=microbatches * (stage.forward_s + stage.backward_s),
        tensor=microbatches * (stage.tensor_forward_s + stage.tensor_backward_s) + end.tensor_s,
        context=microbatches * stage.context_s,
        expert=microbatches * stage.expert_s,
        data=microbatches * (cost.forward_s + cost.backward_s) + end.data_s,
        pipeline_bubble=max(0.0, span[0] - microbatches * (spent[busiest] + 2 * held_s)),
        pipeline_transfer=span[1] + microbatches * 2 * held_s,
        optimizer=end.optimizer_s,
        offload=microbatches * (cost.host_forward_s + cost.host_backward_s) + end.offload_s,
    )
