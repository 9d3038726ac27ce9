import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from llmspec.runtime import loss as module
from llmspec.runtime.collectives import chunk_bounds
from llmspec.runtime.loss import (
    cross_entropy_sum,
    vocabulary_parallel_cross_entropy_sum,
    vocabulary_parallel_embedding,
)
from llmspec.runtime.mesh import Mesh
from tests.processes import run


def batch(vocab: int, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(vocab)
    logits_BTV = (torch.randn(3, 4, vocab, dtype=torch.float64) * 3).to(dtype)
    targets_BT = torch.randint(0, vocab, (3, 4))
    targets_BT[0, 1] = targets_BT[2, 3] = -100
    return logits_BTV.requires_grad_(), targets_BT


def reference(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    flat = logits_BTV.double().flatten(0, 1)
    return F.cross_entropy(flat, targets_BT.flatten(), reduction="sum")


@pytest.mark.parametrize("chunk_bytes", [2**26, 1, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sum_of_token_losses(dtype, chunk_bytes, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    logits, targets = batch(11, dtype)
    ours, theirs = cross_entropy_sum(logits, targets), reference(logits, targets)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    precise = dtype == torch.float64
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-13 if precise else 1e-6, atol=0)
    got = torch.autograd.grad(ours / 7, logits)[0]
    wanted = torch.autograd.grad(theirs / 7, logits)[0]
    assert got.dtype == dtype
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(got.double(), wanted.double(), rtol=rtol, atol=1e-7)


def test_no_counted_target_is_no_loss():
    logits = torch.randn(1, 3, 5).bfloat16().requires_grad_()
    loss = cross_entropy_sum(logits, torch.full((1, 3), -100))
    loss.backward()
    assert loss == 0 and logits.grad is not None and logits.grad.abs().max() == 0


def test_great_logits_do_not_overflow():
    logits = torch.tensor([[[1e4, -1e4, 9999.0]]], dtype=torch.bfloat16, requires_grad=True)
    loss = cross_entropy_sum(logits, torch.tensor([[1]]))
    loss.backward()
    assert loss.isfinite() and loss > 19000 and logits.grad.isfinite().all()


def split_vocabulary(rank: int, world: int) -> None:
    axis = Mesh.create("cpu", tensor=world).tensor
    for vocab in (8, 11, 5, 3, 2):  # 5 over 4 leaves a rank with nothing, so do 3 and 2
        first, stop = chunk_bounds(vocab, axis)
        logits, targets = batch(vocab)
        mine = logits.detach()[..., first:stop].clone().requires_grad_()
        ours = vocabulary_parallel_cross_entropy_sum(mine, targets, vocab, axis)
        theirs = reference(logits, targets)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
        (ours / 7).backward()
        (theirs / 7).backward()
        torch.testing.assert_close(mine.grad, logits.grad[..., first:stop], rtol=1e-12, atol=1e-15)

        whole = torch.randn(vocab, 6, dtype=torch.float64, requires_grad=True)
        table = whole.detach()[first:stop].clone().requires_grad_()
        ids = torch.randint(0, vocab, (3, 4))
        part = vocabulary_parallel_embedding(ids, table, vocab, axis)
        total = part.detach().clone()
        dist.all_reduce(total, group=axis.group)
        torch.testing.assert_close(total, F.embedding(ids, whole), rtol=0, atol=0)
        seed = torch.randn_like(total)
        part.backward(seed)
        F.embedding(ids, whole).backward(seed)
        torch.testing.assert_close(table.grad, whole.grad[first:stop], rtol=1e-13, atol=0)

    logits, targets = batch(11, torch.bfloat16)
    first, stop = chunk_bounds(11, axis)
    mine = logits.detach()[..., first:stop].clone().requires_grad_()
    ours = vocabulary_parallel_cross_entropy_sum(mine, targets, 11, axis)
    torch.testing.assert_close(ours, cross_entropy_sum(logits, targets), rtol=1e-6, atol=0)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_split_vocabulary(world: int):
    run(world, split_vocabulary, world)


def test_runs_on_fake_tensors():
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            logits = torch.randn(2, 3, 50, dtype=dtype, requires_grad=True)
            cross_entropy_sum(logits, torch.zeros(2, 3, dtype=torch.int64)).backward()
            assert logits.grad is not None and logits.grad.dtype == dtype
