"""The last product and the loss in chunks, against whole logits in float64."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from llmspec.runtime import loss as module
from llmspec.runtime.collectives import chunk_bounds
from llmspec.runtime.linear_loss import (
    linear_cross_entropy_sum,
    vocabulary_parallel_linear_cross_entropy_sum,
)
from llmspec.runtime.mesh import Mesh
from tests.live_bytes import LiveBytes
from tests.processes import run

B, T, D, V = 3, 4, 6, 11
SEED = 1 / 7
"""Of the loss: that of a mean over the tokens of a batch, say."""


def operands(dtype=torch.float64, vocab: int = V) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(vocab)
    x = torch.randn(B, T, D, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, D, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (B, T))
    targets[0, 1] = targets[2, 3] = -100
    return x, weight, targets


def whole(x, weight, targets) -> torch.Tensor:
    """Logits as they are in the type of the operands; everything else in float64."""
    logits = x.double() @ weight.double().t()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("chunk_bytes", [2**26, 1, 300])
@pytest.mark.parametrize("rows", [1, 5, 12, 100])
def test_loss_and_gradients(rows, chunk_bytes, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    x, weight, targets = operands()
    ours = linear_cross_entropy_sum(x, weight, targets, rows=rows)
    theirs = whole(x, weight, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
    got = torch.autograd.grad(ours * SEED, (x, weight))
    wanted = torch.autograd.grad(theirs * SEED, (x, weight))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rows", [5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_types(dtype, rows):
    """As near to float64 as whole logits in PyTorch's own operators are, but for a rounding more
    in each chunk."""
    x, weight, targets = operands(dtype)
    wanted = torch.autograd.grad(whole(x, weight, targets) * SEED, (x, weight))
    logits = F.linear(x, weight).float().flatten(0, 1)
    plain = F.cross_entropy(logits, targets.flatten(), reduction="sum") * SEED
    theirs = torch.autograd.grad(plain, (x, weight))
    ours = linear_cross_entropy_sum(x, weight, targets, rows=rows) * SEED
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    got = torch.autograd.grad(ours, (x, weight))
    for mine, other, right in zip(got, theirs, wanted, strict=True):
        assert mine.dtype == dtype
        rounding = torch.finfo(dtype).eps * float(right.double().norm())
        far = float((mine.double() - right.double()).norm())
        assert far <= 1.5 * float((other.double() - right.double()).norm()) + rounding


def test_sums_of_many_rows_stay_in_the_range_of_float16():
    """60_000 equal rows: their sum leaves it, the mean does not."""
    count = 60_000
    x = torch.full((1, count, 2), 4.0, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(8, 2, dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(1, count, dtype=torch.int64)
    (linear_cross_entropy_sum(x, weight, targets, rows=4096) / count).backward()
    wanted = torch.full((8, 2), 0.5)
    wanted[0] -= 4.0
    torch.testing.assert_close(weight.grad.float(), wanted, rtol=4e-3, atol=0)


def test_what_is_left_of_a_nearly_certain_target():
    """1 - p of 3e-4 is not lost where p is rounded to 1."""
    x = torch.tensor([[[1.0]]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[8.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    linear_cross_entropy_sum(x, weight, torch.zeros(1, 1, dtype=torch.int64), rows=4).backward()
    left = torch.sigmoid(torch.tensor(-8.0))
    torch.testing.assert_close(
        weight.grad[:, 0].float(), torch.stack((-left, left)), rtol=4e-3, atol=0
    )


def test_no_counted_target_is_no_loss():
    x, weight, targets = operands()
    loss = linear_cross_entropy_sum(x, weight, targets.fill_(-100), rows=5)
    loss.backward()
    assert loss == 0 and x.grad.abs().max() == 0 and weight.grad.abs().max() == 0


def test_a_frozen_operand_gets_none():
    for frozen in (0, 1):
        given = operands()
        wanted = torch.autograd.grad(whole(*given), given[1 - frozen])
        given[frozen].requires_grad_(False)
        loss = linear_cross_entropy_sum(*given, rows=5)
        torch.testing.assert_close(torch.autograd.grad(loss, given[1 - frozen]), wanted)


def test_an_evaluation_makes_no_gradients():
    x, weight, targets = operands()
    with torch.no_grad(), LiveBytes() as live:
        loss = linear_cross_entropy_sum(x, weight, targets, rows=4)
    torch.testing.assert_close(loss, whole(x, weight, targets), rtol=1e-13, atol=0)
    assert live.peak < 3 * 4 * V * 8 + 20 * B * T * 8


def test_a_second_backward_is_refused():
    """What is kept is scaled where it lies."""
    x, weight, targets = operands()
    loss = linear_cross_entropy_sum(x, weight, targets, rows=4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def split_vocabulary(rank: int, world: int) -> None:
    axis = Mesh.create("cpu", tensor=world).tensor
    for vocab in (8, 11, 5, 3, 2):  # 5 over 4 leaves a rank with nothing, so do 3 and 2
        first, stop = chunk_bounds(vocab, axis)
        x, weight, targets = operands(vocab=vocab)
        mine = weight.detach()[first:stop].clone().requires_grad_()
        own = x.detach().clone().requires_grad_()
        ours = vocabulary_parallel_linear_cross_entropy_sum(own, mine, targets, vocab, axis, rows=5)
        theirs = whole(x, weight, targets)
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=0)
        (ours * SEED).backward()
        (theirs * SEED).backward()
        torch.testing.assert_close(mine.grad, weight.grad[first:stop], rtol=1e-12, atol=1e-15)
        dist.all_reduce(own.grad, group=axis.group)
        torch.testing.assert_close(own.grad, x.grad, rtol=1e-12, atol=1e-15)
        with torch.no_grad():
            again = vocabulary_parallel_linear_cross_entropy_sum(
                own, mine, targets, vocab, axis, rows=5
            )
        torch.testing.assert_close(again, theirs.detach(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_split_vocabulary(world: int):
    run(world, split_vocabulary, world)


def test_runs_on_fake_tensors():
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(2, 3, 8, dtype=dtype, requires_grad=True)
            weight = torch.randn(50, 8, dtype=dtype, requires_grad=True)
            targets = torch.zeros(2, 3, dtype=torch.int64)
            linear_cross_entropy_sum(x, weight, targets, rows=4).backward()
            assert x.grad.dtype == weight.grad.dtype == dtype
