import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from llmspec.runtime.norms import layer_norm, rms_norm


def values(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    x_BTD = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    return x_BTD, *(torch.randn(12, dtype=dtype, requires_grad=True) for _ in range(2))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, leaves: list, **tolerance) -> None:
    torch.testing.assert_close(ours, theirs, **tolerance)
    seed = torch.randn(ours.shape, dtype=ours.dtype)
    got = torch.autograd.grad(ours, leaves, seed)
    wanted = torch.autograd.grad(theirs, leaves, seed)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_rms_norm_is_torchs():
    x, w, _ = values(torch.float64)
    theirs = F.rms_norm(x, (12,), w, 1e-5)
    assert_same(rms_norm(x, w, 1e-5), theirs, [x, w], rtol=1e-12, atol=1e-13)


def test_layer_norm_is_torchs():
    x, w, b = values(torch.float64)
    theirs = F.layer_norm(x, (12,), w, b, 1e-5)
    assert_same(layer_norm(x, w, b, 1e-5), theirs, [x, w, b], rtol=1e-12, atol=1e-13)
    assert_same(layer_norm(x, w, None, 1e-5), F.layer_norm(x, (12,), w, None, 1e-5), [x, w])


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_is_rounded_once(weight_dtype: torch.dtype):
    x64, w64, b64 = (t.detach() for t in values(torch.float64))
    x = x64.bfloat16().requires_grad_()
    w, b = (t.to(weight_dtype).requires_grad_() for t in (w64, b64))
    for ours, exact in [
        (rms_norm(x, w, 1e-5), F.rms_norm(x.double(), (12,), w.double(), 1e-5)),
        (layer_norm(x, w, b, 1e-5), F.layer_norm(x.double(), (12,), w.double(), b.double(), 1e-5)),
    ]:
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-6)
        seed = torch.randn(ours.shape).bfloat16()
        got = torch.autograd.grad(ours, [x, w], seed)
        wanted = torch.autograd.grad(exact, [x, w], seed.double())
        for a, e, like in zip(got, wanted, (x, w), strict=True):
            assert a.dtype == like.dtype
            torch.testing.assert_close(a.double(), e.double(), rtol=2**-7, atol=1e-2)


def test_rms_norm_survives_a_zero_row():
    x = torch.zeros(1, 2, 4, dtype=torch.float64, requires_grad=True)
    w = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(rms_norm(x, w, 1e-5).sum(), x)
    assert grad.isfinite().all()


def test_runs_on_fake_tensors():
    with FakeTensorMode():
        x, w, b = values(torch.float32)
        (rms_norm(x, w, 1e-5) + layer_norm(x, w, b, 1e-5)).sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
