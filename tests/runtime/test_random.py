import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmspec.runtime import random

_MASK = (1 << 64) - 1


def _splitmix(state: int) -> int:
    """The published generator, in whole numbers."""
    z = state & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@given(st.integers(0, _MASK), st.integers(0, 2**62))
@settings(max_examples=50, deadline=None)
def test_bits_are_splitmix64(stream, index):
    expected = _splitmix(stream + index * 0x9E3779B97F4A7C15)
    assert random.bits(stream, torch.tensor([index])).item() & _MASK == expected


def test_published_values():
    # the first outputs for seed 1234567, as other implementations print them
    first = [random.bits(1234567, torch.tensor(i)).item() & _MASK for i in (1, 2, 3)]
    assert first == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_uniform_and_normal_have_their_moments():
    index = torch.arange(1 << 20)
    u, x = random.uniform(1, "a", index), random.normal(1, "a", index)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 2e-3 and abs(u.var() - 1 / 12) < 1e-3
    for power, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        deviation = math.sqrt(math.prod(range(1, 2 * power, 2)) / len(x))
        assert abs((x**power).mean() - expected) < 5 * deviation
    assert 4.5 < x.abs().max() < 6.7
    assert abs(torch.corrcoef(torch.stack([x[:-1], x[1:]]))[0, 1]) < 5e-3
    assert abs(torch.corrcoef(torch.stack([x, random.normal(1, "b", index)]))[0, 1]) < 5e-3


def test_normal_is_box_muller_by_the_library_functions():
    index = torch.arange(10_000)
    z = random.bits(random.key(3, "w"), index)
    radius = ((z >> 32) & 0xFFFFFFFF).double().add(0.5) / 2**32
    angle = (z & 0xFFFFFFFF).double() / 2**32 * 2 * math.pi
    expected = (-2 * radius.log()).sqrt() * angle.cos()
    torch.testing.assert_close(random.normal(3, "w", index), expected, rtol=0, atol=1e-14)


def test_the_same_bits_at_any_length_and_offset():
    whole = random.normal(1, "a", torch.arange(1000))
    for start, stop in ((0, 1), (3, 10), (17, 1000), (999, 1000)):
        assert torch.equal(random.normal(1, "a", torch.arange(start, stop)), whole[start:stop])
    assert torch.equal(random.normal(1, "a", torch.arange(1000)[::3]), whole[::3])


def _dropout(x, samples, *, start=(0, 0), shape=None, p=0.3, operator=1, seed=2, training=True):
    shape = shape or tuple(x.shape[1:])
    return random.dropout(
        x, p, samples, operator=operator, seed=seed, start=start, shape=shape, training=training
    )


def test_dropout_masks_do_not_know_how_the_tensor_is_split():
    x, samples = torch.ones(4, 6, 10), torch.arange(4) + 7
    whole = _dropout(x, samples)
    part = _dropout(x[2:, 3:, 5:], samples[2:], start=(3, 5), shape=(6, 10))
    assert torch.equal(part, whole[2:, 3:, 5:])
    assert not torch.equal(_dropout(x, samples, operator=2), whole)
    assert not torch.equal(_dropout(x, samples, seed=3), whole)
    assert not torch.equal(_dropout(x, samples + 4), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_masks_are_those_of_every_dtype(dtype):
    samples = torch.arange(2)
    keep = _dropout(torch.ones(2, 8, 8), samples) > 0
    x = torch.randn(2, 8, 8).to(dtype).requires_grad_()
    out = _dropout(x, samples)
    assert out.dtype == dtype and torch.equal(out != 0, keep)
    torch.testing.assert_close(out[keep], x[keep] / 0.7)
    out.sum().backward()
    torch.testing.assert_close(x.grad, (keep / 0.7).to(dtype))


def test_dropout_keeps_the_stated_part_and_saves_one_byte_an_element():
    x = torch.ones(8, 128, 128, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = _dropout(x, torch.arange(8), p=0.1)
    assert [(t.dtype, t.shape) for t in saved] == [(torch.bool, x.shape)]
    kept = (out != 0).double().mean()
    assert abs(kept - 0.9) < 5 * math.sqrt(0.09 / x.numel())


def test_no_dropout():
    x = torch.ones(2, 3, 3)
    assert _dropout(x, torch.arange(2), training=False) is x
    assert _dropout(x, torch.arange(2), p=0.0) is x
    assert _dropout(x, torch.arange(2), p=1.0).eq(0).all()


def test_a_mask_of_scattered_places():
    """A part of several runs lists its places."""
    samples = torch.tensor([3, 9])
    how = {"operator": 4, "seed": 5, "shape": (12, 6), "training": True}
    x = torch.ones(2, 12, 6)
    whole = random.dropout(x, 0.5, samples, start=(0, 0), **how)
    places = torch.tensor([2, 3, 8, 9])
    part = random.dropout(x[:, :4, :3], 0.5, samples, start=(places, 2), **how)
    assert torch.equal(part, whole[:, places, 2:5])
