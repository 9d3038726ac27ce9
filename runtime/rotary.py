"""Rotary positions in the "rotate half" convention (as in transformers): x in, rotated x out.

B batch  T tokens  H heads  E head width  h half of it
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .context import token_positions
from .mesh import Axis


def rotary(x_BTHE: Tensor, base: float, start: int = 0, context: Axis | None = None) -> Tensor:
    """Turn the pair (x[i], x[i + E/2]) of token t by the angle (start + t) / base^(2i/E).

    context: the ranks that share the sequence; T are this rank's tokens, wherever they stand.
    """
    length, width = x_BTHE.shape[1], x_BTHE.shape[3]
    assert width % 2 == 0, f"rotary positions turn pairs, and a head of {width} has an odd one"
    # Tables made under a fake-tensor mode are fake: they must not outlive it.
    tables = _tables if type(x_BTHE) is Tensor else _tables.__wrapped__
    wide = torch.promote_types(x_BTHE.dtype, torch.float32)
    cos_T1E, sin_T1h = tables(x_BTHE.device, wide, start, length, width, float(base), context)
    return _Rotate.apply(x_BTHE, cos_T1E, sin_T1h)


def rotary_tables(
    x_BTHE: Tensor, base: float, context: Axis | None = None
) -> tuple[Tensor, Tensor]:
    """(cosines, sines) [T, 1, E] for a kernel: out = x cos + turned(x) sin, where (a, b) -> (-b, a)
    turns the halves of a head."""
    wide = torch.promote_types(x_BTHE.dtype, torch.float32)
    sizes = x_BTHE.device, wide, 0, x_BTHE.shape[1], x_BTHE.shape[3], float(base), context
    whole = _whole_tables if type(x_BTHE) is Tensor else _whole_tables.__wrapped__
    return whole(*sizes)


@lru_cache(maxsize=16)
def _whole_tables(*sizes: Any) -> tuple[Tensor, Tensor]:
    cos_T1E, sin_T1h = _tables.__wrapped__(*sizes)
    with torch.inference_mode(False), torch.no_grad():
        return cos_T1E.contiguous(), torch.cat((sin_T1h, sin_T1h), dim=-1)


@lru_cache(maxsize=16)
def _tables(
    device: torch.device,
    dtype: torch.dtype,
    start: int,
    length: int,
    width: int,
    base: float,
    context: Axis | None,
) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.no_grad():
        exponent_h = torch.arange(0, width, 2, device=device).to(dtype) / width
        if context is None:
            position_T = torch.arange(length, device=device)
        else:
            position_T = token_positions(context, length, device)
        angle_T1h = ((position_T + start).to(dtype)[:, None] * (1.0 / base**exponent_h))[:, None, :]
        cos_T1h = angle_T1h.cos()
        return torch.cat((cos_T1h, cos_T1h), dim=-1), angle_T1h.sin()


def _turn(x_BTHE: Tensor, cos_T1E: Tensor, sin_T1h: Tensor, sign: int) -> Tensor:
    out_BTHE = x_BTHE * cos_T1E  # shorter types are turned in float32 and rounded once
    left, right = x_BTHE.chunk(2, dim=-1)
    out_left, out_right = out_BTHE.chunk(2, dim=-1)
    out_left.addcmul_(right, sin_T1h, value=-sign)
    out_right.addcmul_(left, sin_T1h, value=sign)
    return out_BTHE.to(x_BTHE.dtype)


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back: nothing of x is saved."""

    @staticmethod
    def forward(ctx: Any, x_BTHE: Tensor, cos_T1E: Tensor, sin_T1h: Tensor) -> Tensor:
        ctx.tables = cos_T1E, sin_T1h
        return _turn(x_BTHE, cos_T1E, sin_T1h, 1)

    @staticmethod
    def backward(ctx: Any, grad_BTHE: Tensor) -> tuple[Tensor, None, None]:
        cos_T1E, sin_T1h = ctx.tables
        return _turn(grad_BTHE, cos_T1E, sin_T1h, -1), None, None
