"""Random numbers as functions of (key, position): the same bits on every device and every mesh.

Only integer arithmetic, IEEE + - * / and square roots are used. Library logarithms and cosines
differ in the last bit between devices, and between the middle and the tail of one vector loop.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# sin x = x - x^3/3! + ..., up to x^19, and ln m = 2 artanh s = 2 (s + s^3/3 + ...), up to s^19
_SINE = [(-1) ** k / math.factorial(2 * k + 1) for k in range(10)]
_LOGARITHM = [2.0 / (2 * k + 1) for k in range(10)]


def key(seed: int, name: str) -> int:
    """A 64-bit key for the stream called name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little")


def bits(stream: int | Tensor, index: Tensor) -> Tensor:
    """64 random bits (as int64) for each index; splitmix64 started at `stream`.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    z = index * _signed(_GOLDEN)
    z += stream if isinstance(stream, Tensor) else _signed(stream)
    z ^= _shift_right(z, 30)
    z *= _signed(0xBF58476D1CE4E5B9)
    z ^= _shift_right(z, 27)
    z *= _signed(0x94D049BB133111EB)
    z ^= _shift_right(z, 31)
    return z


def uniform(seed: int, name: str, index: Tensor) -> Tensor:
    """float64 in [0, 1) with 53 random bits, for each index (int64)."""
    return _shift_right(bits(key(seed, name), index), 11).double().mul_(2.0**-53)


def normal(seed: int, name: str, index: Tensor) -> Tensor:
    """float64, mean 0, deviation 1, |x| < 6.7, for each index (int64); Box and Muller 1958."""
    z = bits(key(seed, name), index)
    radius = (_shift_right(z, 32).double() + 0.5).mul_(2.0**-32)
    turn = (z & 0xFFFFFFFF).double().mul_(2.0**-32)
    # cos(2 pi t) = sin(2 pi (|t - 1/2| - 1/4)), an angle within a quarter turn
    angle = ((turn - 0.5).abs_() - 0.25).mul_(2.0 * math.pi)
    sine = _odd_polynomial(angle, _SINE)
    return _logarithm(radius).mul_(-2.0).sqrt_().mul_(sine)


def dropout(
    x: Tensor,
    p: float,
    samples_B: Tensor,
    *,
    operator: int,
    seed: int,
    start: tuple[int | Tensor, ...],
    shape: tuple[int, ...],
    training: bool,
) -> Tensor:
    """Zero with probability p, scale the rest by 1 / (1 - p).

    x: [B, *local]; its part of the whole per-sample tensor of this shape begins at `start`; in a
        dim whose part is no single run, `start` lists its places (int64).
    samples_B: int64 counters of the samples over the whole run; with the operator's number and
        the position they decide the mask, so no split of the model or the batch changes it.
    """
    if not training or p == 0.0:
        return x
    keep = _keep_mask(x.shape, p, samples_B, key(seed, f"dropout {operator}"), start, shape)
    return _Mask.apply(x, keep, 1.0 / (1.0 - p) if p < 1.0 else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """What a dropout inside a kernel is drawn from: the element in row r and column c of a sample
    is dropped when bits(bits(stream, sample), places[r] + c) < threshold.

    samples: [B]. places: int64, one for each row of a sample. raised: what is kept is times this.
    """

    samples: Tensor
    places: Tensor
    stream: int
    threshold: int
    raised: float

    @classmethod
    def of(
        cls,
        x: Tensor,
        p: float,
        samples_B: Tensor,
        *,
        operator: int,
        seed: int,
        start: tuple[int | Tensor, ...],
        shape: tuple[int, ...],
        training: bool,
    ) -> "Mask":
        """As `dropout` has them; nothing is dropped outside training."""
        p = p if training else 0.0
        fixed = type(x) is Tensor and all(isinstance(s, int) for s in start)
        places = _row_places if fixed else _row_places.__wrapped__
        return cls(
            samples=samples_B,
            places=places(tuple(x.shape[1:-1]), start, shape, samples_B.device),
            stream=_signed(key(seed, f"dropout {operator}")),
            threshold=_threshold(p),
            raised=1.0 / (1.0 - p) if p < 1.0 else 0.0,
        )


@lru_cache(maxsize=64)
def _row_places(
    rows: tuple[int, ...], start: tuple[int | Tensor, ...], shape: tuple[int, ...], device: Any
) -> Tensor:
    """Where each row of a sample begins in the whole sample's tensor."""
    with torch.inference_mode(False), torch.no_grad():
        first = whole_index(rows, start[:-1], shape[:-1], device).flatten()
        return first * shape[-1] + start[-1]


def keep_scaled(
    x: Tensor, samples: Tensor, places: Tensor, stream: int | Tensor, threshold: int, raised: float
) -> Tensor:
    """[B, …] in x's wide type: 0 where a Mask drops, `raised` elsewhere."""
    columns = torch.arange(x.shape[-1], device=places.device)
    index = (places[:, None] + columns).view(x.shape[1:])
    streams = bits(stream, samples)
    kind = torch.promote_types(x.dtype, torch.float32)
    if torch.compiler.is_compiling():  # whose kernel has no work space
        streams = streams.view(-1, *[1] * index.dim())
        return (bits(streams, index.expand(x.shape)) >= threshold).to(kind) * raised
    keep = torch.empty(x.shape, dtype=torch.bool, device=samples.device)
    for row, sample_stream in zip(keep, streams, strict=True):
        torch.ge(bits(sample_stream, index), threshold, out=row)
    return keep.to(kind).mul_(raised)


def round_to_bfloat16(x: Tensor, random_bits: Tensor) -> Tensor:
    """One of the two neighbours of float32 x, the nearer one the likelier: x on average.

    random_bits: 64 of them (int64) for each element; the upper 16 decide.
    """
    # the lower half of the pattern is the share of the way to the next one: a sum that carries
    raised = x.view(torch.int32) + _shift_right(random_bits, 48).int()
    return (raised & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def whole_index(
    local_shape: tuple[int, ...],
    start: tuple[int | Tensor, ...],
    shape: tuple[int, ...],
    device: Any,
) -> Tensor:
    """Flat positions in a tensor of this shape of the block of local_shape that begins at start."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, first, whole in zip(local_shape, start, shape, strict=True):
        if isinstance(first, Tensor):
            along = first.to(device)
        else:
            along = torch.arange(first, first + size, dtype=torch.int64, device=device)
        index = index.unsqueeze(-1) * whole + along
    return index


def _keep_mask(
    local_shape: torch.Size,
    p: float,
    samples_B: Tensor,
    stream: int,
    start: tuple[int | Tensor, ...],
    shape: tuple[int, ...],
) -> Tensor:
    index = whole_index(tuple(local_shape[1:]), start, shape, samples_B.device)
    streams_B = bits(stream, samples_B)
    threshold = _threshold(p)
    keep = torch.empty(local_shape, dtype=torch.bool, device=samples_B.device)
    # sample by sample: the 64-bit work space is that of one sample
    for row, sample_stream in zip(keep, streams_B, strict=True):
        torch.ge(bits(sample_stream, index), threshold, out=row)
    return keep


def _threshold(p: float) -> int:
    """Of signed bits: a share p lies below it."""
    return min(int(p * 2.0**64), _MASK) - (1 << 63)


class _Mask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keep: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(keep)
        ctx.scale = scale
        return (x * scale).mul_(keep)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (keep,) = ctx.saved_tensors
        return (gradient * ctx.scale).mul_(keep), None, None


def _logarithm(x: Tensor) -> Tensor:
    """Of normal positive float64, within 1e-15 relative."""
    pattern = x.view(torch.int64)
    # x = 2^e m with m in [1/sqrt 2, sqrt 2): adding this carries into the exponent for large m
    exponent = ((pattern + 0x95F6200000000) >> 52) - 1023
    m = (pattern - (exponent << 52)).view(torch.float64)
    return _odd_polynomial((m - 1.0).div_(m + 1.0), _LOGARITHM) + exponent.double() * math.log(2.0)


def _odd_polynomial(x: Tensor, coefficients: list[float]) -> Tensor:
    # separate kernels on purpose: a fused multiply-add rounds differently
    square = x * x
    out = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        out.mul_(square).add_(coefficient)
    return out.mul_(x)


def _shift_right(z: Tensor, by: int) -> Tensor:
    """Logical: int64 has only the arithmetic shift."""
    return (z >> by).bitwise_and_(_MASK >> by)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
