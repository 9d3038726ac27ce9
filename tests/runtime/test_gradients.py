import torch
from torch import nn

from llmspec.runtime.gradients import Turn, sum_over
from llmspec.runtime.initialise import initialise
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.replicated_data_parallel import ReplicatedGradients
from tests.processes import run
from tests.runtime import tiny
from tests.runtime.reference import local_batch
from tests.runtime.traffic import Traffic


def _partial_sums(rank: int) -> None:
    mesh = Mesh.create("cpu", tensor=2)
    model = tiny.Stage(mesh, range(0, tiny.LAYERS))
    gradients = ReplicatedGradients(model, mesh)
    initialise(model, mesh, seed=1)
    norms = 1 + tiny.LAYERS
    assert len(gradients.partial) == 1 + norms + tiny.LAYERS, "positions, norms, output biases"
    (micro,) = local_batch(mesh).microbatches(1)
    gradients.before_microbatch(Turn(first=True, last=True))
    model(micro.tokens_BT, micro.targets_BT, micro.samples_B).backward()
    with Traffic() as traffic:
        gradients.finish()
    assert dict(traffic.counts) == {"allreduce": 1}


def test_all_partial_gradients_are_summed_in_one_message():
    run(2, _partial_sums)


def _dtypes(rank: int) -> None:
    axis = Mesh.create("cpu", tensor=2).tensor
    parameters = [nn.Parameter(torch.zeros(n)) for n in (2, 3)]
    parameters.append(nn.Parameter(torch.zeros(4, dtype=torch.bfloat16)))
    for p in parameters:
        p.grad = torch.full_like(p, rank + 1)
    with Traffic() as traffic:
        sum_over(parameters, axis)
    assert traffic.counts["allreduce"] == 2
    assert all(p.grad.eq(3).all() and p.grad.dtype == p.dtype for p in parameters)


def test_one_message_for_each_dtype():
    run(2, _dtypes)
