"""The time of one optimizer step, in parts that sum to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from llmspec.compiler.cost.data import DataCost
from llmspec.compiler.cost.hardware import UPDATE, Machine
from llmspec.compiler.cost.network import Group, collective_s
from llmspec.compiler.cost.offload import Offload, update_s
from llmspec.compiler.cost.play import Ending, Played, StageWork, play
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

    def ending(self) -> Ending:
        """What of it follows a rank's list of actions."""
        return Ending(tensor_s=self.tensor_s, update_s=self.optimizer_s + self.offload_s)


def optimizer_s(elements: int, types: Types, machine: Machine) -> float:
    """Gradients are read for clipping and again by the update; weights and moments read and
    written."""
    stored = 2 * types.gradients + 2 * types.weights + 2 * types.moments
    moved = elements * (machine.optimizer_bytes or stored + types.scratch)
    return machine.forward_s(UPDATE, moved / machine.memory_bytes_per_s, launches=4)


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
        stage.whole_forward_s + data.weights_forward_s + data.forward_s + data.host_forward_s,
        stage.whole_backward_s + data.weights_backward_s + data.backward_s + data.host_backward_s,
    )


def stage_work(stage: Stage, data: DataCost, held_s: float, *, splits: bool) -> StageWork:
    """held_s: by which a message lengthens each. splits: whether the schedule has backwards in two
    parts."""
    forward, backward = durations(stage, data)
    return StageWork(
        forward_s=forward + held_s,
        backward_s=backward + held_s,
        late_s=stage.late_s if splits else 0.0,
        gather_s=data.first_s,
        reduce_s=data.last_s,
    )


def step_times(
    stages: Sequence[Stage],
    data: Sequence[DataCost],
    tails: Sequence[Tail],
    microbatches: int,
    span: tuple[float, float],
    held_s: float = 0.0,
) -> Times:
    """`held_s`: by which each message lengthens a forward or a backward of a rank. `span`: what
    `makespan_s` gave, with it. The parts are those of the busiest stage and of the longest tail;
    what the stage waits for is the bubble."""
    spent = [sum(durations(s, d)) for s, d in zip(stages, data, strict=True)]
    busiest = max(range(len(stages)), key=lambda i: spent[i])
    end = max(tails, key=lambda t: t.total)
    return _parts(
        stages[busiest],
        data[busiest],
        end,
        microbatches,
        bubble_s=max(0.0, span[0] - microbatches * (spent[busiest] + 2 * held_s)),
        transfer_s=span[1] + microbatches * 2 * held_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a step's action lists are played with.

    works: by stage. ranks, data, tails: by pipeline rank. send_s, tied_s: as in `play`. held_s: by
        which messages lengthen each forward and each backward of a stage; part of `works`.
    """

    lists: Mapping[int, Sequence[str]]
    works: tuple[StageWork, ...]
    ranks: tuple[Stage, ...]
    data: tuple[DataCost, ...]
    tails: tuple[Tail, ...]
    microbatches: int
    send_s: float
    tied_s: float
    held_s: float = 0.0

    @property
    def rank_held_s(self) -> float:
        """By which messages hold up a rank in a step."""
        return 2 * self.microbatches * self.held_s * len(self.works) / len(self.ranks)

    def play(self, *, messages: bool = True) -> Played:
        """`messages`: whether those between stages take time."""
        endings = [tail.ending() for tail in self.tails]
        return play(self.lists, self.works, self.send_s if messages else 0.0, endings, self.tied_s)

    def done_s(self, played: Played) -> list[float]:
        """By rank, of what it does itself: nothing that it waits for, and nothing twice."""
        own = [
            self.microbatches * sum(durations(s, d)) + t.total + self.rank_held_s
            for s, d, t in zip(self.ranks, self.data, self.tails, strict=True)
        ]
        return [seconds - played.hidden_s(rank) for rank, seconds in enumerate(own)]

    def times(self) -> Times:
        """The parts are the busiest rank's; what it waits for is the bubble, and what messages add
        to the step stands apart."""
        bare, whole = self.play(messages=False), self.play()
        done = self.done_s(bare)
        rank = max(range(len(done)), key=lambda i: done[i])
        found = _parts(
            self.ranks[rank],
            self.data[rank],
            self.tails[rank],
            self.microbatches,
            bubble_s=max(0.0, bare.stop_s - done[rank]),
            transfer_s=whole.stop_s - bare.stop_s + self.rank_held_s,
        )
        return replace(found, data=found.data - bare.hidden_s(rank))


def _parts(
    stage: Stage,
    cost: DataCost,
    end: Tail,
    microbatches: int,
    *,
    bubble_s: float,
    transfer_s: float,
) -> Times:
    return Times(
        compute=microbatches
        * (stage.forward_s + stage.backward_s + cost.weights_forward_s + cost.weights_backward_s),
        tensor=microbatches * (stage.tensor_forward_s + stage.tensor_backward_s) + end.tensor_s,
        context=microbatches * stage.context_s,
        expert=microbatches * stage.expert_s,
        data=microbatches * (cost.forward_s + cost.backward_s) + end.data_s,
        pipeline_bubble=bubble_s,
        pipeline_transfer=transfer_s,
        optimizer=end.optimizer_s,
        offload=microbatches * (cost.host_forward_s + cost.host_backward_s) + end.offload_s,
    )
