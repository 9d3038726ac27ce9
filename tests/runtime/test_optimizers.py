import torch
import torch._dynamo  # optimizers import it: once here, not in every forked rank
import torch.distributed as dist
from torch import nn

from llmspec.runtime.mesh import Mesh
from llmspec.runtime.optimizers import adamw, named_parameters, set_learning_rate, sgd
from llmspec.runtime.parameters import parameter, traits
from tests.processes import run


class Model(nn.Module):
    def __init__(self, mesh: Mesh):
        super().__init__()
        init = None  # filled below
        self.split = parameter((6, 4), mesh=mesh, init=init, split={"tensor": 0})
        self.whole = parameter((4, 4), mesh=mesh, init=init)
        self.fused_bias = parameter((3, 4), mesh=mesh, init=init, decay=False)
        self.norm = parameter((4,), mesh=mesh, init=init)
        self.plain = nn.Parameter(torch.empty(2, 2, device="meta"))
        traits(self)  # kept on the module, as wrappers do, before parameters are replaced
        self.to_empty(device="cpu")
        self.tied = self.whole
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(1.0)


def plain_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.25)


def check_decay(rank: int, world: int) -> None:
    mesh = Mesh.create("cpu", tensor=world)
    model = Model(mesh)
    optimizer = adamw(model, lr=0.5, weight_decay=0.1)
    set_learning_rate(optimizer, 0.01)
    plain_gradients(model)
    optimizer.step()
    moved = {name: p.detach() for name, p in named_parameters(model)}
    assert list(moved) == ["split", "whole", "fused_bias", "norm", "plain"]
    for name, p in moved.items():
        decays = name in ("split", "whole", "plain")
        expected = 1.0 - 0.01 * (1.0 + (0.1 if decays else 0.0))
        local = getattr(p, "_local_tensor", p)
        torch.testing.assert_close(local, torch.full_like(local, expected), msg=name)

    optimizer = sgd([model], lr=0.1, momentum=0.9)
    plain_gradients(model)
    before = model.norm.detach().clone()
    optimizer.step()
    optimizer.step()
    change = getattr(before - model.norm.detach(), "_local_tensor", before - model.norm.detach())
    torch.testing.assert_close(change, torch.full_like(change, 0.1 * 0.25 * 2.9))
    dist.barrier()  # none leaves while another still connects


def test_decay_and_kinds_of_parameters():
    for world in (1, 2):
        run(world, check_decay, world)
