"""Clocks, rates and memory of one device, a CPU among them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """bytes_per_s, flops: what a copy and a bfloat16 product (float32 on a CPU) really reach."""

    name: str
    kind: str
    bytes_per_s: float
    flops: float
    memory_bytes: int

    @property
    def short(self) -> torch.dtype:
        return torch.bfloat16 if self.kind == "cuda" else torch.float32


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], repeats: int = 10) -> float:
    """The median of so many calls, each with what the device still has to do for it."""
    for _ in range(WARM_UP):
        call()
    found = []
    for _ in range(repeats):
        synchronise()
        start_s = time.perf_counter()
        call()
        synchronise()
        found.append(time.perf_counter() - start_s)
    return statistics.median(found)


def peak_bytes(call: Callable[[], Any]) -> int:
    """What a call has alive at most beyond what was there; 0 on a CPU, which does not count."""
    if not torch.cuda.is_available():
        return 0
    synchronise()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    synchronise()
    return torch.cuda.max_memory_allocated() - before


def distance(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|, over all numbers."""
    size = float(wanted.double().norm())
    return float((got.double() - wanted.double()).norm()) / max(size, 1e-30)


def this_device(tiny: bool) -> Device:
    cuda = torch.cuda.is_available()
    kind, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    elements, side = (2**20, 256) if tiny else (2**28, 8192)
    source = torch.ones(elements, dtype=dtype, device=kind)
    target = torch.empty_like(source)
    copied = seconds(lambda: target.copy_(source), 5)
    source = target = source[:0].clone()
    matrix = torch.ones(side, side, dtype=dtype, device=kind)
    product = seconds(lambda: matrix @ matrix, 5)
    return Device(
        name=torch.cuda.get_device_name() if cuda else "cpu",
        kind=kind,
        bytes_per_s=2 * elements * dtype.itemsize / copied,
        flops=2.0 * side**3 / product,
        memory_bytes=torch.cuda.get_device_properties(0).total_memory if cuda else 0,
    )
