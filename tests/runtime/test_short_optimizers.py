import torch
import torch._dynamo  # optimizers import it: once here, not in every forked rank
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from llmspec.runtime import short_optimizers
from llmspec.runtime.mesh import Mesh
from llmspec.runtime.random import bits, round_to_bfloat16
from tests.processes import run

SHAPES = {"wide": (5, 7), "tall": (9, 2), "bias": (3,)}
STEPS = 4
ADAMW = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(name, nn.Parameter(value))


def gradient(p: Tensor, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step + p.numel())
    return torch.randn(p.shape, generator=generator).to(p.dtype)


def trained(dtype: torch.dtype, **how) -> tuple[Model, torch.optim.Optimizer]:
    model = Model(dtype)
    optimizer = short_optimizers.adamw(model, **ADAMW, **how)
    for step in range(STEPS):
        for p in model.parameters():
            p.grad = gradient(p, step)
        optimizer.step()
    return model, optimizer


def test_float32_is_pytorch():
    model, _ = trained(torch.float32, moments=torch.float32)
    other = Model(torch.float32)
    decayed = [p for p in other.parameters() if p.ndim >= 2]
    groups = [{"params": decayed}, {"params": [other.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, **ADAMW, fused=True)
    for step in range(STEPS):
        for p in other.parameters():
            p.grad = gradient(p, step)
        optimizer.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_short_types_round_each_step():
    """Every update is PyTorch's on float32 copies, rounded once."""
    for moments in (torch.float32, torch.bfloat16):
        model, optimizer = trained(torch.bfloat16, moments=moments)
        for name, start in Model(torch.bfloat16).named_parameters():
            p = start.detach().clone()
            m, v = torch.zeros(p.shape, dtype=moments), torch.zeros(p.shape, dtype=moments)
            for step in range(STEPS):
                wide = nn.Parameter(p.float())
                wide.grad = gradient(p, step).float()
                decay = {"weight_decay": 0.1 if p.ndim >= 2 else 0.0}
                one = torch.optim.AdamW([wide], **(ADAMW | decay), fused=True)
                one.state[wide] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": m.float(),
                    "exp_avg_sq": v.float(),
                }
                one.step()
                p = wide.detach().bfloat16()
                m, v = (one.state[wide][k].to(moments) for k in ("exp_avg", "exp_avg_sq"))
            got = model.get_parameter(name)
            assert torch.equal(got, p)
            assert torch.equal(optimizer.state[got]["exp_avg_sq"], v)
            assert optimizer.state[got]["exp_avg"].dtype == moments


def test_sgd():
    for momentum in (0.0, 0.9):
        model, other = Model(torch.float32), Model(torch.float32)
        ours = short_optimizers.sgd(model, lr=0.1, momentum=momentum, moments=torch.float32)
        theirs = torch.optim.SGD(other.parameters(), lr=0.1, momentum=momentum)
        for step in range(STEPS):
            for p in (*model.parameters(), *other.parameters()):
                p.grad = gradient(p, step)
            ours.step()
            theirs.step()
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b)
        assert ("momentum_buffer" in ours.state[model.wide]) == (momentum > 0)


def test_rounding_is_unbiased():
    """Only the two neighbours, each as often as x is nearer to it."""
    count = 20_000
    for value in (1.0, 1.001, -1.0003, 3.14159, 1e-20, -7.7e30, 255.49):
        x = torch.full((count,), value, dtype=torch.float32)
        rounded = round_to_bfloat16(x, bits(7, torch.arange(count)))
        low, high = rounded.double().min(), rounded.double().max()
        step = abs(float(high - low))
        assert set(rounded.tolist()) <= {float(low), float(high)} and low <= x[0].double() <= high
        mean = float(rounded.double().mean())
        # a mean of `count` coins is within five deviations; a nearest rounding would be out
        assert abs(mean - float(x[0].double())) <= 5 * 0.5 * step / count**0.5
        if step:
            assert step <= 2**-7 * abs(value)


def split_parts(rank: int) -> dict[str, list]:
    """The same steps with every weight cut over two ranks."""
    mesh = Mesh.create("cpu", shards=2)
    model = Model(torch.bfloat16)
    for name, p in list(model.named_parameters()):
        parts = p.detach().chunk(2, dim=0)
        own = DTensor.from_local(
            parts[rank].clone(),
            mesh.devices("shards"),
            [Shard(0)],
            run_check=False,
            shape=p.shape,
            stride=p.stride(),
        )
        setattr(model, name, nn.Parameter(own))
    optimizer = short_optimizers.adamw(
        model, **ADAMW, moments=torch.bfloat16, rounding="stochastic", seed=11
    )
    for step in range(STEPS):
        for name, p in model.named_parameters():
            whole = gradient(Model(torch.bfloat16).get_parameter(name), step)
            p.grad = DTensor.from_local(
                whole.chunk(2, dim=0)[rank].clone(),
                p.device_mesh,
                p.placements,
                run_check=False,
                shape=p.shape,
                stride=p.stride(),
            )
        optimizer.step()
    out = {name: p.full_tensor().tolist() for name, p in model.named_parameters()}
    dist.barrier()
    return out


def test_stochastic_rounding_does_not_know_the_plan():
    how = {"moments": torch.bfloat16, "rounding": "stochastic"}
    model, _ = trained(torch.bfloat16, seed=11, **how)
    other, _ = trained(torch.bfloat16, seed=12, **how)
    nearest, _ = trained(torch.bfloat16, moments=torch.bfloat16)
    ranks = run(2, split_parts)
    for name, p in model.named_parameters():
        for rank in ranks:
            assert rank[name] == p.tolist(), name
    assert not torch.equal(model.wide, other.wide), "another seed rounds otherwise"
    assert not torch.equal(model.wide, nearest.wide)
