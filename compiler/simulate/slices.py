"""What an event of a step is made of: computing, and what each axis leaves in the open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmspec.compiler.cost.data import DataCost
from llmspec.compiler.cost.play import GATHER, PARTIAL, REDUCE, TIED, UPDATE, Event
from llmspec.compiler.cost.stage import Run
from llmspec.compiler.cost.step import Step
from llmspec.compiler.forecast import Priced

COMPUTE, OPTIMIZER, OFFLOAD = "compute", "optimizer", "offload"
MESSAGES = "pipeline_transfer"


@dataclass(frozen=True, slots=True)
class Slice:
    """Seconds of one part of a step, by the names of `time_s` in docs/json.md."""

    part: str
    name: str
    spent_s: float


class Slices:
    """Of every event of a step."""

    def __init__(self, known: Priced, step: Step):
        self.tails = step.tails
        plan, space, shape = known.plan, known.space, known.shape
        stages = list(known.stages)
        data = space.pricing.data_costs(shape, stages, plan.zero, plan.mesh.shards, plan.offload)
        instances = space.graph(1).instances
        held = Slice(MESSAGES, "held up by messages", step.held_s)
        self.made: dict[tuple[int, str], tuple[Slice, ...]] = {}
        for index, (stage, cost) in enumerate(zip(stages, data, strict=True)):
            first, stop = shape.cut[index]
            runs = stage.named_runs([i.unit for i in instances[first:stop]])
            for kind, slices in (
                ("F", [*_forward(runs, cost), held]),
                ("B", [*_backward(runs, cost, late=False), held]),
                ("I", [*_backward(runs, cost, late=True), held]),
                ("W", _late(runs)),
            ):
                self.made[index, kind] = tuple(s for s in slices if s.spent_s)

    def of(self, event: Event) -> tuple[Slice, ...]:
        """In the order in which they are drawn. Their seconds add up to the event's."""
        if event.kind in ("F", "B", "I", "W"):
            return self.made[event.stage, event.kind]
        if event.kind == UPDATE:
            tail = self.tails[event.rank]
            both = (
                Slice(OPTIMIZER, "update weights", tail.optimizer_s),
                Slice(OFFLOAD, "gradients out, weights back", tail.offload_s),
            )
            return tuple(s for s in both if s.spent_s)
        part, name = _ONCE[event.kind]
        return (Slice(part, name, event.spent_s),)


_ONCE = {
    "SEND_F": (MESSAGES, "to the stage after"),
    "SEND_B": (MESSAGES, "to the stage before"),
    GATHER: ("data", "gather parameters"),
    REDUCE: ("data", "reduce gradients"),
    TIED: ("data", "sum weights of two stages"),
    PARTIAL: ("tensor", "sum partial gradients"),
}


def _words(name: str, run: Run) -> str:
    return name if run.count == 1 else f"{run.count} x {name}"


def _of_run(
    run: Run, words: str, compute_s: float, tensor_s: float, context_s: float, expert_s: float
) -> Iterator[Slice]:
    """Seconds are of one use."""
    yield Slice(COMPUTE, words, run.count * compute_s)
    yield Slice("tensor", words, run.count * tensor_s)
    yield Slice("context", words, run.count * context_s)
    yield Slice("expert", words, run.count * expert_s)


def _forward(runs: Sequence[tuple[str, Run]], data: DataCost) -> Iterator[Slice]:
    for name, run in runs:
        cost = run.cost
        sent = (cost.tensor_forward_s, cost.context_forward_s, cost.expert_forward_s)
        yield from _of_run(run, _words(name, run), cost.forward_s, *sent)
    yield Slice(COMPUTE, "cast weights", data.weights_forward_s)
    yield Slice("data", "gather", data.forward_s)
    yield Slice(OFFLOAD, "activations or parameters", data.host_forward_s)


def _late(runs: Sequence[tuple[str, Run]]) -> Iterator[Slice]:
    for name, run in runs:
        yield Slice(COMPUTE, _words(name, run), run.count * run.cost.late.seconds)


def _backward(runs: Sequence[tuple[str, Run]], data: DataCost, *, late: bool) -> Iterator[Slice]:
    """`late`: without what a split backward leaves for later."""
    for name, run in reversed(runs):
        cost, words, again = run.cost, _words(name, run), run.recompute
        if again is not None:
            sent = (again.tensor_s, again.context_s, again.expert_s)
            yield from _of_run(run, f"{words} again", again.forward_s, *sent)
        later = cost.late.seconds if late else 0.0
        sent = (cost.tensor_backward_s, cost.context_backward_s, cost.expert_backward_s)
        yield from _of_run(run, words, cost.backward_s - later, *sent)
    yield Slice(COMPUTE, "add up gradients", data.weights_backward_s)
    yield Slice("data", "gather and reduce", data.backward_s)
    yield Slice(OFFLOAD, "activations or parameters", data.host_backward_s)
