"""Attention over context ranks against the same attention on one device."""

from collections.abc import Callable
from itertools import product

import pytest
import torch

from llmspec.runtime import attention_blocks
from llmspec.runtime import context_attention as ca
from llmspec.runtime.attention import explicit_attention
from llmspec.runtime.context import own_tokens
from llmspec.runtime.mesh import Mesh
from tests.processes import run

STYLES: dict[str, Callable] = {
    "ring": ca.ring_attention,
    "gather": ca.gather_attention,
    "ulysses": ca.ulysses_attention,
}
MASKS = [(True, None), (False, None), (True, 3), (True, 9), (False, 2), (False, 11), (True, 99)]
HEADS = [(4, 4), (4, 2), (8, 1), (12, 3)]
B, E = 2, 8


def _inputs(
    tokens: int, heads: int, kv_heads: int, kind: torch.dtype, values: int = E
) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(heads)
    # q, k, v, and the result's gradient
    shapes = [(heads, E), (kv_heads, E), (kv_heads, values), (heads, values)]
    return [torch.randn(B, tokens, *shape, generator=draw, dtype=kind) for shape in shapes]


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    error = float((a - b).norm() / b.norm())
    assert error <= tolerance, error


def _compare(
    rank: int,
    n: int,
    style: str,
    kind: torch.dtype,
    tolerance: float,
    explicit: bool,
    values: int = E,
) -> int:
    axis = Mesh.create("cpu", context=n).context
    compared = 0
    for (causal, window), (heads, kv_heads) in product(MASKS, HEADS):
        whole = _inputs(8 * n, heads, kv_heads, kind, values)
        leaves = [x.double().requires_grad_() for x in whole[:3]]
        expected = explicit_attention(*leaves, causal, window)
        wanted = torch.autograd.grad((expected * whole[3]).sum(), leaves)
        own = [own_tokens(x, 1, axis) for x in whole]
        q, k, v = (x.clone().requires_grad_() for x in own[:3])
        out = STYLES[style](q, k, v, axis, causal=causal, window=window, explicit=explicit)
        assert out.dtype == kind
        _close(out.double(), own_tokens(expected, 1, axis), tolerance)
        gradients = torch.autograd.grad((out * own[3]).sum(), (q, k, v))
        for gradient, want in zip(gradients, wanted, strict=True):
            _close(gradient.double(), own_tokens(want, 1, axis), tolerance)
        compared += 1
    return compared


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("style", STYLES)
def test_float64(style: str, n: int) -> None:
    assert run(n, _compare, n, style, torch.float64, 1e-12, False) == [28] * n


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("values", [5, 12])
def test_values_of_another_width(style: str, values: int) -> None:
    assert run(2, _compare, 2, style, torch.float64, 1e-12, False, values) == [28] * 2


@pytest.mark.parametrize("style", STYLES)
def test_explicit(style: str) -> None:
    assert run(2, _compare, 2, style, torch.float64, 1e-12, True) == [28] * 2


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_short_types(style: str, kind: torch.dtype, tolerance: float) -> None:
    assert run(2, _compare, 2, style, kind, tolerance, False) == [28] * 2


def test_scores_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a block that is written out do not depend on how many are at hand at once."""
    q, k, v, grad = (x.transpose(1, 2) for x in _inputs(16, 4, 2, torch.float64))
    block = attention_blocks.visible(slice(0, 16), slice(0, 16), 5, True, 4)
    assert block is not None
    whole = attention_blocks.forward(q, k, v, block, False)
    log = whole[1].masked_fill(whole[1].isinf(), 0.0)  # of other blocks, in earnest
    after = attention_blocks.backward(grad, q, k, v, whole[0], log, block, False)
    monkeypatch.setattr(attention_blocks, "SCORES_BYTES", 3 * B * 4 * 16 * 8)
    pieces = attention_blocks.forward(q, k, v, block, False)
    again = attention_blocks.backward(grad, q, k, v, pieces[0], log, block, False)
    for a, b in zip((*whole, *after), (*pieces, *again), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("causal", "window"), MASKS)
def test_blocks_cover_what_is_seen(ranks: int, causal: bool, window: int | None) -> None:
    """Every pair of tokens that the mask allows is in one block, and equally many on each rank
    where the mask is causal alone."""
    half = 4
    work = []
    for rank in range(ranks):
        at = [rank * half + i for i in range(half)]
        at += [(2 * ranks - 1 - rank) * half + i for i in range(half)]
        found: list[tuple[int, int]] = []
        computed = 0
        for source in range(ranks):
            keys = [source * half + i for i in range(half)]
            keys += [(2 * ranks - 1 - source) * half + i for i in range(half)]
            for block in ca.blocks(rank, source, ranks, 2 * half, causal, window):
                for i, t in enumerate(at[block.queries]):
                    for j, s in enumerate(keys[block.keys]):
                        computed += 1
                        back = block.offset + i - j
                        if (not block.causal or back >= 0) and (
                            block.window is None or abs(back) < block.window
                        ):
                            found.append((t, s))
        work.append(computed)
        wanted = {
            (t, s)
            for t in at
            for s in range(2 * ranks * half)
            if (not causal or s <= t) and (window is None or abs(t - s) < window)
        }
        assert len(found) == len(set(found)), "no pair twice"
        assert set(found) == wanted
    if causal and window is None:
        assert len(set(work)) == 1, work
