"""A mixture of experts written as emitted programs are: experts over expert ranks, each width of
theirs over tensor ranks, against every expert on one device in float64.

R rows (tokens)  S rows of this rank's experts  X experts  x this rank's  D width  F hidden width
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llmspec.runtime.checkpoint import Checkpoints
from llmspec.runtime.clip import clip_
from llmspec.runtime.collectives import all_reduce, sum_gradient
from llmspec.runtime.exchange import exchange_counts, return_to_tokens, send_to_experts
from llmspec.runtime.gradients import Turn, local_gradient
from llmspec.runtime.initialise import Normal, fill, initialise
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.optimizers import adamw
from llmspec.runtime.parameters import is_expert, local, parameter
from llmspec.runtime.replicated_data_parallel import ReplicatedGradients
from llmspec.runtime.sharded_data_parallel import ShardedGradients
from tests.processes import run
from tests.runtime.reference import own_block

X, D, F, LAYERS, ROWS, MICROBATCHES, SEED = 4, 8, 12, 2, 24, 2, 3
TYPE, INIT = torch.float64, Normal(std=0.3)
SHAPES = {
    "head": (D,),
    **{
        f"layer.{i}.{name}": shape
        for i in range(LAYERS)
        for name, shape in {
            "router": (X, D),
            "experts.up": (X, F, D),
            "experts.down": (X, D, F),
        }.items()
    },
}


class Experts(nn.Module):
    def __init__(self, mesh: Mesh):
        super().__init__()
        how = {"mesh": mesh, "init": INIT, "dtype": TYPE}
        self.up = parameter((X, F, D), split={"expert": 0, "tensor": 1}, **how)
        self.down = parameter((X, D, F), split={"expert": 0, "tensor": 2}, **how)

    def forward(self, rows_SD: Tensor, counts_x: Tensor) -> Tensor:
        up, down = local(self.up), local(self.down)
        parts = rows_SD.split(counts_x.tolist())
        return torch.cat(
            [torch.tanh(p @ u.T) @ d.T for p, u, d in zip(parts, up, down, strict=True)]
        )


class Block(nn.Module):
    def __init__(self, mesh: Mesh):
        super().__init__()
        self.router = parameter((X, D), mesh=mesh, init=INIT, dtype=TYPE)
        self.experts = Experts(mesh)
        self.mesh = mesh

    def forward(self, x_RD: Tensor) -> Tensor:
        gates_R, expert_R = (x_RD @ local(self.router).T).softmax(-1).max(-1)
        order_R = expert_R.argsort(stable=True)
        counts_X = expert_R.bincount(minlength=X)
        rows_RD = sum_gradient(x_RD, self.mesh.tensor)[order_R]
        if self.mesh.expert.size == 1:
            out_RD = self.experts(rows_RD, counts_X)
        else:
            exchange = exchange_counts(counts_X, self.mesh.expert)
            out_SD = self.experts(send_to_experts(rows_RD, exchange), exchange.counts_x)
            out_RD = return_to_tokens(out_SD, exchange)
        out_RD = all_reduce(out_RD, self.mesh.tensor)[order_R.argsort()]
        return x_RD + gates_R[:, None] * out_RD


class Model(nn.Module):
    def __init__(self, mesh: Mesh):
        super().__init__()
        self.layer = nn.ModuleDict({str(i): Block(mesh) for i in range(LAYERS)})
        self.head = parameter((D,), mesh=mesh, init=INIT, dtype=TYPE)

    def forward(self, x_RD: Tensor) -> Tensor:
        for block in self.layer.values():
            x_RD = block(x_RD)
        return (x_RD @ local(self.head)).tanh().sum()


@dataclass(frozen=True, kw_only=True)
class Reference:
    parameters: dict[str, Tensor]
    gradients: dict[str, Tensor]
    norm: Tensor


def one_device() -> Reference:
    """Every expert computes every token; the choice is a mask."""
    p = {}
    for name, shape in SHAPES.items():
        p[name] = torch.empty(shape, dtype=TYPE)
        fill(p[name], shape, (0,) * len(shape), INIT, SEED, name)
        p[name].requires_grad_()
    x = rows()
    for i in range(LAYERS):
        gates, expert = (x @ p[f"layer.{i}.router"].T).softmax(-1).max(-1)
        hidden = torch.tanh(torch.einsum("rd,xfd->rxf", x, p[f"layer.{i}.experts.up"]))
        every = torch.einsum("rxf,xdf->rxd", hidden, p[f"layer.{i}.experts.down"])
        x = x + gates[:, None] * every[torch.arange(len(x)), expert]
    (x @ p["head"]).tanh().sum().backward()
    gradients = {name: w.grad for name, w in p.items()}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    return Reference(parameters=p, gradients=gradients, norm=norm)


def rows() -> Tensor:
    return torch.randn(ROWS, D, dtype=TYPE, generator=torch.Generator().manual_seed(1))


def build(mesh: Mesh, zero: int):
    model = Model(mesh)
    gradients: ReplicatedGradients | ShardedGradients = (
        ShardedGradients(model, mesh, units=[*model.layer.values()], zero=zero)
        if zero
        else ReplicatedGradients(model, mesh)
    )
    initialise(model, mesh, seed=SEED)
    return model, gradients


def step(model: nn.Module, gradients, mesh: Mesh) -> None:
    own = rows().chunk(mesh.reduction.size * MICROBATCHES)[
        mesh.reduction.rank :: mesh.reduction.size
    ]
    for i, part in enumerate(own):
        gradients.before_microbatch(Turn(first=i == 0, last=i == MICROBATCHES - 1))
        model(part).backward()
    gradients.finish()


def _case(rank: int, sizes: dict[str, int], zeros: tuple[int, ...]) -> None:
    mesh, want = Mesh.create("cpu", **sizes), one_device()
    for zero in zeros:
        model, gradients = build(mesh, zero)
        for name, p in model.named_parameters():
            held = p._local_tensor if isinstance(p, DTensor) else p
            assert torch.equal(held, own_block(want.parameters[name], p)), name
            assert is_expert(p) == (".experts." in name and mesh.expert.size > 1), name
        for _ in range(2):  # the second step finds nothing of the first
            step(model, gradients, mesh)
            for name, p in model.named_parameters():
                expected = own_block(want.gradients[name], p)
                error = (local_gradient(p) - expected).norm()
                assert error <= 1e-9 * max(expected.norm(), 1e-6 * want.norm), (zero, name, error)
        norm = clip_(model.parameters(), mesh, 0.1)
        torch.testing.assert_close(norm, want.norm, rtol=1e-10, atol=0)


LONG = pytest.mark.long


@pytest.mark.parametrize(
    "sizes",
    [
        {"shards": 2, "expert": 2},
        {"shards": 2, "tensor": 2, "expert": 2},
        {"shards": 3},  # four experts in three parts: cut inside them
        pytest.param({"shards": 4, "expert": 2}, marks=LONG),
        pytest.param({"shards": 4, "expert": 4}, marks=LONG),
        pytest.param({"replicas": 2, "shards": 2, "expert": 2}, marks=LONG),
        pytest.param({"replicas": 2, "shards": 2, "expert": 4}, marks=LONG),
        pytest.param({"shards": 2, "context": 2, "expert": 2}, marks=LONG),
    ],
    ids=lambda sizes: "-".join(f"{k}-{v}" for k, v in sizes.items()),
)
def test_equals_one_device(sizes: dict[str, int]) -> None:
    world = 1
    for name, size in sizes.items():
        world *= size if name != "expert" else 1
    run(world, _case, sizes, (0, 1, 2, 3))


def _shards(rank: int) -> list[tuple[int, ...]]:
    mesh = Mesh.create("cpu", shards=4, expert=2)
    model = Model(mesh)
    block = model.layer["0"]
    # one expert on a rank: its parts are cut along its width, not padded to whole experts
    block.experts.up = parameter((2, F, D), mesh=mesh, init=INIT, split={"expert": 0})
    ShardedGradients(model, mesh, units=[*model.layer.values()], zero=3)
    held = [block.experts.up, block.experts.down, block.router]
    return [tuple(p._local_tensor.shape) for p in held]


def test_parts_are_equal_and_of_the_ranks_with_the_same_experts() -> None:
    assert run(4, _shards) == [[(1, F // 2, D), (1, D, F), (1, D)]] * 4


def _nobody_asks(rank: int) -> None:
    """Experts without a row, and a rank that neither sends nor gets one."""
    mesh = Mesh.create("cpu", shards=2, expert=2)
    counts_X = torch.tensor([[0, 0, 0, 3], [0, 0, 1, 0]][rank])
    rows_RD = torch.arange(int(counts_X.sum()) * 2.0).view(-1, 2).add(10 * rank).requires_grad_()
    exchange = exchange_counts(counts_X, mesh.expert)
    rows_SD = send_to_experts(rows_RD, exchange)
    back_RD = return_to_tokens(rows_SD * 2, exchange)
    torch.testing.assert_close(back_RD, rows_RD * 2)
    assert exchange.counts_x.tolist() == [[0, 0], [1, 3]][rank]
    expected = [torch.empty(0, 2), torch.tensor([[10.0, 11], [0, 1], [2, 3], [4, 5]])][rank]
    assert torch.equal(rows_SD, expected), rows_SD
    back_RD.square().sum().backward()
    torch.testing.assert_close(rows_RD.grad, 8 * rows_RD.detach())


def test_ranks_and_experts_without_rows() -> None:
    run(2, _nobody_asks)


def _train(rank: int, sizes: dict[str, int], zero: int, folder: str, steps: int):
    mesh = Mesh.create("cpu", **sizes)
    model, gradients = build(mesh, zero)
    optimizer = adamw(model, lr=0.01)
    checkpoints = Checkpoints(folder, mesh)
    resumed = checkpoints.restore(model, optimizer)
    for _ in range(resumed["step"] if resumed else 0, steps):
        step(model, gradients, mesh)
        optimizer.step()
    checkpoints.save(steps, model, optimizer, wait=True)
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).tolist()
        for name, p in model.named_parameters()
    }


def test_a_checkpoint_resumes_on_another_number_of_expert_ranks(tmp_path) -> None:
    plans = [
        (4, {"shards": 4, "expert": 2}, 3),
        (2, {"replicas": 2, "expert": 2}, 0),
        (1, {}, 0),
    ]
    for done, (world, sizes, zero) in enumerate(plans):
        moved = run(world, _train, sizes, zero, str(tmp_path / "moved"), 2 * done + 2)
    stayed = run(1, _train, {}, 0, str(tmp_path / "stayed"), 2 * len(plans))
    for name, value in stayed[0].items():
        torch.testing.assert_close(
            torch.tensor(moved[0][name], dtype=TYPE),
            torch.tensor(value, dtype=TYPE),
            rtol=1e-9,
            atol=1e-12,
        )


def _positions(rank: int):
    mesh = Mesh.create("cpu", pipeline=2, replicas=2, shards=2, context=1, tensor=1, expert=2)
    groups = (mesh.expert.group, mesh.expert_data.group)
    return [torch.distributed.get_process_group_ranks(g) for g in groups], mesh.expert.rank


def test_expert_ranks_are_neighbours_among_the_data_ranks() -> None:
    for rank, (groups, position) in enumerate(run(8, _positions)):
        stage, first, data = rank // 4 * 4, rank // 2 * 2, rank % 2
        assert groups == [[first, first + 1], [stage + data, stage + data + 2]]
        assert position == data
