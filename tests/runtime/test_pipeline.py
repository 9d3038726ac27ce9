"""The executor by itself; with data and tensor axes and every ZeRO level: test_combined.py."""

import weakref
from itertools import pairwise

import pytest
import torch
from torch import nn

from llmspec.compiler.schedules import Schedule, actions, parse_action, stages_of
from llmspec.runtime.clip import clip_
from llmspec.runtime.initialise import initialise
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.pipeline import Executor, TiedWeights
from llmspec.runtime.replicated_data_parallel import ReplicatedGradients
from llmspec.runtime.sharded_data_parallel import ShardedGradients
from tests.processes import run
from tests.runtime import tiny
from tests.runtime.reference import ROWS, check_gradients, check_loss, local_batch, one_device
from tests.runtime.traffic import Traffic


def _executor(
    mesh: Mesh, cuts: tuple[int, ...], schedule: Schedule, microbatches: int, zero=0, kind=Executor
):
    """As many stages as cuts say."""
    ranges = [range(*pair) for pair in pairwise(cuts)]
    stages = len(ranges)
    own = stages_of(schedule, mesh.pipeline.rank, stages, mesh.pipeline.size)
    models = {stage: tiny.Stage(mesh, ranges[stage]) for stage in own}
    gradients: dict = {}
    for stage, model in models.items():
        units = model.layer.values()
        gradients[stage] = (
            ShardedGradients(model, mesh, units=units, zero=zero)
            if zero
            else ReplicatedGradients(model, mesh)
        )
        initialise(model, mesh, seed=tiny.SEED)
    return kind(
        stages=models,
        gradients=gradients,
        actions=actions(schedule, stages, mesh.pipeline.size, microbatches, zero),
        mesh=mesh,
        microbatches=microbatches,
        boundary=((ROWS // (microbatches * mesh.data.size), tiny.T, tiny.D), tiny.TYPE),
        tied=[TiedWeights("embed.weight", 0, stages - 1)],
    )


def _several(rank: int, ranks: int, schedule: Schedule) -> None:
    """Four stages, one of them without layers."""
    mesh, reference = Mesh.create("cpu", pipeline=ranks), one_device()
    last = 0 if schedule.turns else None
    for microbatches in (1, 2, 4):
        executor = _executor(mesh, (0, 1, 1, 2, 3), schedule, microbatches)
        batch = local_batch(mesh)
        check_loss(executor.evaluate(batch), reference.evaluated, mesh, last)
        check_loss(executor.step(batch), reference.loss, mesh, last)
        for model in executor.stages.values():
            check_gradients(model, reference, scale=1.0)
        parameters = [p for model in executor.stages.values() for p in model.parameters()]
        norm = clip_(parameters, mesh, None, counted_elsewhere=executor.copies())
        torch.testing.assert_close(norm, reference.norm, rtol=1e-10, atol=0)


SEVERAL = [s for s in Schedule if s.allows(2)]


@pytest.mark.parametrize("schedule", [Schedule.GPIPE, *SEVERAL])
def test_several_stages_on_a_rank(schedule):
    run(2, _several, 2, schedule)


def test_several_stages_on_one_rank():
    run(1, _several, 1, Schedule.GPIPE)


class _Seen(Executor):
    """Notes what it computes, and on how many products each backward has worked."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.words: list[str] = []
        self.late: dict[str, int] = {}

    def _forward(self, step, action):
        self.words.append(f"{action.stage}F{action.microbatch}")
        return super()._forward(step, action)

    def _backward(self, step, action):
        self.words.append(f"{action.stage}{action.kind}{action.microbatch}")
        super()._backward(step, action)
        self.late[self.words[-1]] = len(step.late.get((action.stage, action.microbatch), ()))

    def _weights(self, step, action):
        self.words.append(f"{action.stage}W{action.microbatch}")
        super()._weights(step, action)
        assert (action.stage, action.microbatch) not in step.late


def _executed(rank: int, schedule: Schedule, stages: int) -> tuple[list[str], dict[str, int]]:
    mesh = Mesh.create("cpu", pipeline=2)
    cuts = (0, 2, 3) if stages == 2 else (0, 1, 1, 2, 3)
    executor = _executor(mesh, cuts, schedule, 4, kind=_Seen)
    executor.step(local_batch(mesh))
    return executor.words, executor.late


@pytest.mark.parametrize("schedule", Schedule)
def test_executes_its_list(schedule):
    stages = 2 if schedule.allows(1) else 4
    lists = actions(schedule, stages, 2, 4, 0)
    for rank, (words, late) in enumerate(run(2, _executed, schedule, stages)):
        assert words == [w for w in lists[rank] if parse_action(w).kind in ("F", "B", "I", "W")]
        # q, k, v, o, up and down of each layer; the last stage's table
        layers = {2: (2, 1), 4: (1, 0, 1, 1)}[stages]
        for word, count in late.items():
            action = parse_action(word)
            table = action.stage == stages - 1
            expected = 6 * layers[action.stage] + table
            assert count == (expected if action.kind == "I" else 0)


def _messages(rank: int) -> dict[str, int]:
    mesh = Mesh.create("cpu", pipeline=2)
    executor = _executor(mesh, (0, 2, 3), Schedule.ONE_F_ONE_B, 4)
    batch = local_batch(mesh)
    executor.step(batch)
    with Traffic() as traffic:
        executor.step(batch)
    return dict(traffic.counts)


def test_only_boundaries_and_tied_gradients_are_sent():
    assert run(2, _messages) == [{"send": 5, "recv": 5}] * 2


def _reductions(rank: int, zero: int, schedule: Schedule) -> dict[str, int]:
    mesh = Mesh.create("cpu", pipeline=2, shards=2)
    executor = _executor(mesh, (0, 2, 3), schedule, 4, zero)
    batch = local_batch(mesh)
    executor.step(batch)
    with Traffic() as traffic:
        executor.step(batch)
    counts = traffic.counts
    return {name: counts[name] for name in ("allgather_base", "reduce_scatter_base", "allreduce")}


@pytest.mark.parametrize("schedule", [Schedule.ONE_F_ONE_B, Schedule.ZERO_BUBBLE])
@pytest.mark.parametrize(
    ("zero", "gathers", "scatters"),
    [
        # groups: each layer, and the stage's other parameters
        (1, 1, 1),
        (2, 1, 4),
        # for 4 micro-batches: before the forward and before the backward; the last stage's other
        # parameters, and layers whose backward follows at once, may be still there
        (3, 8, 4),
    ],
)
def test_zero_means_in_a_pipeline_what_it_says(zero, gathers, scatters, schedule):
    for rank, counts in enumerate(run(4, _reductions, zero, schedule)):
        groups = 3 if rank < 2 else 2
        expected = {
            "allgather_base": gathers * groups,
            "reduce_scatter_base": scatters * groups,
            "allreduce": 0,
        }
        assert counts == expected


class _Watched(nn.Module):
    """Counts how many of its outputs are alive when it is called."""

    def __init__(self, stage: nn.Module):
        super().__init__()
        self.stage, self.most = stage, 0
        self.alive: weakref.WeakSet = weakref.WeakSet()

    def forward(self, *args):
        out = self.stage(*args)
        self.alive.add(out)
        self.most = max(self.most, len(self.alive))
        return out


def _in_flight(rank: int, schedule: Schedule) -> int:
    mesh = Mesh.create("cpu", pipeline=2)
    executor = _executor(mesh, (0, 2, 3), schedule, 8)
    watched = _Watched(executor.stages[rank])
    executor.stages = {rank: watched}
    executor.tied = ()
    executor.step(local_batch(mesh))
    assert len(watched.alive) == 0
    return watched.most


def test_values_are_dropped_when_their_backward_is_done():
    # the last stage's loss is divided at once, and only the quotient kept
    assert run(2, _in_flight, Schedule.ONE_F_ONE_B) == [2, 1]
    assert run(2, _in_flight, Schedule.GPIPE) == [8, 1]


def _misfits(rank: int) -> None:
    mesh = Mesh.create("cpu")
    stage = tiny.Stage(mesh, range(0, 3))
    how = {"mesh": mesh, "microbatches": 1, "boundary": ((), tiny.TYPE)}
    gradients = ReplicatedGradients(stage, mesh)
    with pytest.raises(ValueError, match="not a pipeline action: '0Q1'"):
        Executor(stages={0: stage}, gradients={0: gradients}, actions={0: ("0Q1",)}, **how)
    with pytest.raises(AssertionError, match="the lists give this rank stages"):
        Executor(stages={0: stage}, gradients={0: gradients}, actions={0: ("1F0",)}, **how)


def test_lists_that_do_not_fit_are_refused():
    run(1, _misfits)
