import torch
from torch import nn

from llmspec.runtime.gradients import Turn
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.replicated_data_parallel import ReplicatedGradients
from tests.processes import run
from tests.runtime.traffic import Traffic


class _Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*[nn.Linear(6, 6) for _ in range(5)])
        self.unused = nn.Linear(6, 6)
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)
        self.to(dtype)

    def forward(self, x):
        # the first layer twice: its gradient arrives once, summed
        return (self.layers(self.layers[0](x)) * self.frozen).square().sum()


def _input(rank: int, micro: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * rank + micro)
    return torch.randn(3, 6, dtype=torch.float64, generator=generator).to(dtype)


def _step(model, gradients, rank, microbatches, dtype=torch.float64):
    for i in range(microbatches):
        gradients.before_microbatch(Turn(first=i == 0, last=i == microbatches - 1))
        model(_input(rank, i, dtype)).backward()
    gradients.finish()


def _expected(world, microbatches):
    model = _Model()
    sum(model(_input(r, i)) for r in range(world) for i in range(microbatches)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _sums(rank: int, world: int) -> None:
    mesh = Mesh.create("cpu", replicas=world)
    model = _Model()
    gradients = ReplicatedGradients(model, mesh)
    for microbatches in (1, 3, 1):
        with Traffic() as traffic:
            _step(model, gradients, rank, microbatches)
        assert traffic.counts["allreduce"] == len(gradients.buckets), (
            "one sum for each bucket and step"
        )
        for name, expected in _expected(world, microbatches).items():
            gradient = model.get_parameter(name).grad
            if expected is None and not name.startswith("unused"):
                assert gradient is None, name
            elif expected is None:
                assert gradient is None if world == 1 else gradient.eq(0).all()
            else:
                torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert (len(gradients.buckets) > 2) == (world > 1)
    gradients.zero()
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_sums_over_data_ranks_and_microbatches():
    for world in (1, 2, 3):
        run(world, _sums, world)


def _early(rank: int, use_all: bool) -> int:
    """Buckets under way when the backward reaches the first layer."""
    model = _Model()
    if use_all:
        model.unused.requires_grad_(False)
    gradients = ReplicatedGradients(model, Mesh.create("cpu", shards=2))
    seen = []
    gradients.before_microbatch(Turn(first=True, last=True))
    first = model.layers[0].weight
    first.register_post_accumulate_grad_hook(lambda p: seen.append(gradients.state.launched))
    model(_input(rank, 0)).backward()
    gradients.finish()
    return seen[0]


def test_sums_start_during_the_backward():
    assert min(run(2, _early, True)) >= 2
    # a parameter without a gradient holds back all after it, so that ranks agree on the order
    assert run(2, _early, False) == [0, 0]


def _reduce_type(rank: int) -> None:
    model = _Model(torch.bfloat16)
    gradients = ReplicatedGradients(model, Mesh.create("cpu", replicas=2), reduce=torch.float32)
    with Traffic() as traffic:
        _step(model, gradients, rank, 2, torch.bfloat16)
    assert traffic.dtypes["allreduce"] == {torch.float32}
    weight = model.layers[2].weight
    assert weight.grad.dtype == torch.bfloat16
    expected = _expected(2, 2)["layers.2.weight"]
    assert (weight.grad - expected).norm() < 0.03 * expected.norm()


def test_sums_in_another_dtype():
    run(2, _reduce_type)
