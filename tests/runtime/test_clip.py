import torch

from llmspec.runtime.clip import clip_
from llmspec.runtime.mesh import Mesh
from tests.processes import run

# sharded, split and tied parameters: test_combined.py


def _one_process(rank: int) -> None:
    mesh = Mesh.create("cpu")
    for max_norm in (0.5, 1e9):
        ours = [torch.nn.Parameter(torch.ones(n)) for n in (1, 5, 17)]
        theirs = [torch.nn.Parameter(torch.ones(n)) for n in (1, 5, 17)]
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.arange(1.0, 1 + len(p))
            q.grad = p.grad.clone()
        unused = torch.nn.Parameter(torch.ones(3))
        norm = clip_([*ours, unused], mesh, max_norm)
        assert norm.dtype == torch.float64
        torch.testing.assert_close(norm.float(), torch.nn.utils.clip_grad_norm_(theirs, max_norm))
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        before = [p.grad.clone() for p in ours]
        clip_(ours, mesh, None)
        assert all(torch.equal(p.grad, b) for p, b in zip(ours, before, strict=True))


def test_as_torch_on_one_process():
    run(1, _one_process)


def _replicated(rank: int) -> float:
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 1e20)  # its square is beyond float32
    norm = clip_([p], Mesh.create("cpu", replicas=2), 1.0)
    torch.testing.assert_close(p.grad, torch.full((4,), 0.5))
    return norm.item()


def test_replicas_count_once_and_large_gradients_do_not_overflow():
    for norm in run(2, _replicated):
        assert abs(norm / 2e20 - 1) < 1e-6
