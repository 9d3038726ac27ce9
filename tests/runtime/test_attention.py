import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmspec.runtime.attention import attention, explicit_attention


def plain(q, k, v, causal: bool, window: int | None, start: int) -> torch.Tensor:
    """Query by query, key by key, as one would explain it."""
    repeat = q.shape[2] // k.shape[2]
    rows = []
    for t in range(q.shape[1]):
        seen = [
            s
            for s in range(k.shape[1])
            if (s <= t + start or not causal) and (window is None or abs(t + start - s) < window)
        ]
        keys = k[:, seen].repeat_interleave(repeat, 2)
        scores = torch.einsum("bhe,bshe->bhs", q[:, t], keys) / q.shape[3] ** 0.5
        values = v[:, seen].repeat_interleave(repeat, 2)
        rows.append(torch.einsum("bhs,bshe->bhe", scores.softmax(-1), values))
    return torch.stack(rows, 1)


CASES = [
    # queries, keys, heads, key/value heads, causal, window, start
    (6, 6, 4, 4, True, None, 0),
    (6, 6, 4, 2, True, None, 0),
    (6, 6, 3, 1, False, None, 0),
    (4, 7, 2, 2, False, None, 0),
    (8, 8, 4, 2, True, 3, 0),
    (8, 8, 2, 2, True, 1, 0),
    (8, 8, 2, 2, True, 8, 0),
    (8, 8, 2, 2, True, 7, 0),
    (8, 8, 2, 1, False, 3, 0),
    (4, 8, 2, 2, True, None, 4),
    (4, 8, 4, 2, True, 3, 4),
    (4, 8, 2, 2, False, 2, 2),
]


@pytest.mark.parametrize("form", [attention, explicit_attention])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(form, case):
    length, keys, heads, kv_heads, causal, window, start = case
    torch.manual_seed(3)
    q = torch.randn(2, length, heads, 8, dtype=torch.float64, requires_grad=True)
    k = torch.randn(2, keys, kv_heads, 8, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, keys, kv_heads, 8, dtype=torch.float64, requires_grad=True)
    ours = form(q, k, v, causal, window, start)
    theirs = plain(q, k, v, causal, window, start)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    seed = torch.randn_like(theirs)
    got, wanted = (torch.autograd.grad(y, [q, k, v], seed) for y in (ours, theirs))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", [attention, explicit_attention])
def test_bfloat16(form):
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, 16, 2, 8).bfloat16() for _ in range(3))
    out = form(q, k, v, True)
    assert out.dtype == torch.bfloat16
    exact = attention(q.double(), k.double(), v.double(), True)
    torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.03)


def test_fake_masks_do_not_stay():
    with FakeTensorMode():
        x = torch.randn(1, 9, 2, 4)
        assert attention(x, x, x, True, 3).shape == x.shape
    x = torch.randn(1, 9, 2, 4)
    assert torch.isfinite(attention(x, x, x, True, 3)).all()
