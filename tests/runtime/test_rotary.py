import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llmspec.runtime.mesh import Axis
from llmspec.runtime.rotary import rotary


def plain(x_BTHE: torch.Tensor, base: float, start: int = 0) -> torch.Tensor:
    width, length = x_BTHE.shape[3], x_BTHE.shape[1]
    inverse = 1.0 / base ** (torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.arange(start, start + length).double(), inverse)
    cos, sin = (torch.cat([f, f], -1)[:, None, :] for f in (angles.cos(), angles.sin()))
    left, right = x_BTHE.chunk(2, -1)
    return x_BTHE * cos + torch.cat([-right, left], -1) * sin


def test_is_transformers_convention():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=24, num_attention_heads=3, rope_theta=10000.0)
    x_BTHE = torch.randn(2, 7, 3, 8)
    cos, sin = llama.LlamaRotaryEmbedding(config)(x_BTHE, torch.arange(7)[None])
    theirs, _ = llama.apply_rotary_pos_emb(x_BTHE.transpose(1, 2), x_BTHE.transpose(1, 2), cos, sin)
    torch.testing.assert_close(rotary(x_BTHE, 10000.0), theirs.transpose(1, 2))


@pytest.mark.parametrize("start", [0, 5])
def test_values_and_gradients(start: int):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 3, 8, dtype=torch.float64, requires_grad=True)
    ours, theirs = rotary(x, 500.0, start), plain(x, 500.0, start)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    seed = torch.randn(2, 3, 6, 8, dtype=torch.float64).transpose(1, 2)  # as attention hands it
    got, wanted = (torch.autograd.grad(y, x, seed)[0] for y in (ours, theirs))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


def test_a_slice_of_the_sequence_is_the_whole_ones_slice():
    x = torch.randn(1, 8, 2, 4)
    assert torch.equal(rotary(x[:, 3:], 100.0, start=3), rotary(x, 100.0)[:, 3:])


def test_bfloat16_is_rounded_once():
    x = torch.randn(1, 300, 2, 16).bfloat16()
    ours = rotary(x, 10000.0)
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours.double(), plain(x.double(), 10000.0), rtol=2**-8, atol=1e-4)


def test_fake_tables_do_not_stay():
    with FakeTensorMode():
        x = torch.randn(1, 11, 2, 4, requires_grad=True)
        rotary(x, 321.0).sum().backward()
    real = torch.randn(1, 11, 2, 4)
    assert torch.isfinite(rotary(real, 321.0)).all()


def test_tables_made_in_inference_mode_serve_training():
    with torch.inference_mode():
        rotary(torch.randn(1, 13, 2, 4), 77.0)
    x = torch.randn(1, 13, 2, 4, requires_grad=True)
    rotary(x, 77.0).sum().backward()


def test_odd_heads_are_refused():
    with pytest.raises(AssertionError, match="a head of 3"):
        rotary(torch.randn(1, 2, 1, 3), 10.0)


def test_context_ranks_turn_by_their_own_places() -> None:
    """Rank 1 of 2 holds the second and the third of four chunks."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(2, 8, 3, 6, generator=draw, dtype=torch.float64)
    axis = Axis(name="context", rank=1, size=2, group=None)
    part = rotary(x[:, 2:6], 100.0, context=axis)
    assert torch.equal(part, rotary(x, 100.0)[:, 2:6])
    assert not torch.equal(part, rotary(x[:, 2:6], 100.0))
