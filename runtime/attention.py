"""Attention of T queries to S keys and values, by PyTorch's kernels or with its square written out.

B batch  T queries  S keys  H query heads  K key/value heads  E head width
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    causal: bool,
    window: int | None = None,
    start: int = 0,
) -> Tensor:
    """Returns [B, T, H, E]; values may have heads of another width, which is the result's then.

    start: the first query's position among the keys, where queries are a slice of the sequence.
    window: a token sees itself and the window - 1 before it (and after it, unless causal).
    """
    length, keys = q_BTHE.shape[1], k_BSKE.shape[1]
    mask_TS = None
    plain_causal = causal and start == 0 and length == keys
    if _masked(causal and not plain_causal, window, length, keys, start):
        plain_causal = False
        mask_TS = _visible_like(q_BTHE, length, keys, causal, window, start)
    width, values = q_BTHE.shape[3], v_BSKE.shape[3]
    grouped = q_BTHE.shape[2] != k_BSKE.shape[2]
    if grouped and not _takes_groups(q_BTHE, mask_TS):
        k_BSKE, v_BSKE = (_for_all_heads(x, q_BTHE.shape[2]) for x in (k_BSKE, v_BSKE))
        grouped = False
    if width != values:  # the kernels that write no square out want one width
        widest = max(width, values)
        q_BTHE, k_BSKE, v_BSKE = (_filled(x, widest) for x in (q_BTHE, k_BSKE, v_BSKE))
    out_BHTE = F.scaled_dot_product_attention(
        q_BTHE.transpose(1, 2),
        k_BSKE.transpose(1, 2),
        v_BSKE.transpose(1, 2),
        attn_mask=mask_TS,
        is_causal=plain_causal,
        scale=width**-0.5,
        enable_gqa=grouped,
    )
    out_BTHE = out_BHTE.transpose(1, 2)
    return out_BTHE[..., :values] if values < width else out_BTHE


def _takes_groups(q_BTHE: Tensor, mask_TS: Tensor | None) -> bool:
    """Flash attention shares key/value heads itself, and takes neither masks nor, on GPUs, float32.
    The memory-efficient kernel takes both and shares nothing: asked to, PyTorch would write the
    square out."""
    return mask_TS is None and not (q_BTHE.is_cuda and q_BTHE.dtype == torch.float32)


def _for_all_heads(x_BSKE: Tensor, heads: int) -> Tensor:
    return x_BSKE.repeat_interleave(heads // x_BSKE.shape[2], dim=2)


def _filled(x: Tensor, width: int) -> Tensor:
    """Zeros behind the last dim until it is so wide."""
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def explicit_attention(
    q_BTHE: Tensor,
    k_BSKE: Tensor,
    v_BSKE: Tensor,
    causal: bool,
    window: int | None = None,
    start: int = 0,
) -> Tensor:
    """`attention` with scores and weights [B, H, T, S] written out."""
    repeat = q_BTHE.shape[2] // k_BSKE.shape[2]
    k_BHSE = k_BSKE.transpose(1, 2).repeat_interleave(repeat, dim=1)
    v_BHSE = v_BSKE.transpose(1, 2).repeat_interleave(repeat, dim=1)
    scale = q_BTHE.shape[3] ** -0.5
    scores_BHTS = (q_BTHE.transpose(1, 2) * scale) @ k_BHSE.transpose(2, 3)
    weights_BHTS = masked_softmax(scores_BHTS, causal, window, start)
    return (weights_BHTS @ v_BHSE).transpose(1, 2)


def masked_softmax(
    scores_BHTS: Tensor, causal: bool, window: int | None = None, start: int = 0
) -> Tensor:
    """Weights over the keys that each query sees, in the type of the scores; inside, PyTorch's
    kernels have float32 at least, and autograd keeps nothing wider than the result."""
    length, keys = scores_BHTS.shape[2:]
    if _masked(causal, window, length, keys, start):
        hidden = _hidden if type(scores_BHTS) is Tensor else _hidden.__wrapped__
        mask_TS = hidden(scores_BHTS.device, length, keys, causal, window, start)
        scores_BHTS = scores_BHTS.masked_fill(mask_TS, float("-inf"))
    return scores_BHTS.softmax(dim=-1)


def _masked(causal: bool, window: int | None, length: int, keys: int, start: int) -> bool:
    """Whether some query does not see some key."""
    if causal and start < keys - 1:
        return True
    return window is not None and window <= max(start + length - 1, keys - 1 - start)


def _visible_like(
    x: Tensor, length: int, keys: int, causal: bool, window: int | None, start: int
) -> Tensor:
    # Masks made under a fake-tensor mode are fake: they must not outlive it.
    visible = _visible if type(x) is Tensor else _visible.__wrapped__
    return visible(x.device, length, keys, causal, window, start)


@lru_cache(maxsize=4)
def _hidden(
    device: torch.device, length: int, keys: int, causal: bool, window: int | None, start: int
) -> Tensor:
    with torch.inference_mode(False):
        return ~_visible.__wrapped__(device, length, keys, causal, window, start)


@lru_cache(maxsize=4)
def _visible(
    device: torch.device, length: int, keys: int, causal: bool, window: int | None, start: int
) -> Tensor:
    with torch.inference_mode(False):
        query_T1 = torch.arange(start, start + length, device=device)[:, None]
        key_S = torch.arange(keys, device=device)
        mask_TS = torch.ones(length, keys, dtype=torch.bool, device=device)
        if causal:
            mask_TS &= key_S <= query_T1
        if window is not None:
            mask_TS &= (query_T1 - key_S).abs() < window
        return mask_TS
