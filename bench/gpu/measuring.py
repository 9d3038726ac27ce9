"""Clocks, rates and memory of one device, a CPU among them.

`python -m bench.gpu.measuring [tiny]` says what this one is."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bench.gpu.processes import say

WARM_UP = 3
HIDDEN_S = 4e-3
"""A GPU sleeps so long before a call that is timed: the host has launched all of it by then."""
CYCLES_PER_S = 1.7e9
FLUSHED_BYTES = 2**28
"""Written before each call: more than caches hold, so that operands come from memory."""


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
    """The median of so many calls: on a GPU of the device's time alone, its caches cold."""
    for _ in range(WARM_UP):
        call()
    once = _on_gpu if torch.cuda.is_available() else _on_cpu
    return statistics.median(once(call) for _ in range(repeats))


def _on_cpu(call: Callable[[], Any]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def _on_gpu(call: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flushed().zero_()
    torch.cuda._sleep(int(HIDDEN_S * CYCLES_PER_S))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@cache
def _flushed() -> Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")


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
    elements, side = (2**20, 256) if tiny else (2**29, 8192)
    source = torch.ones(elements, dtype=dtype, device=kind)
    target = torch.empty_like(source)
    copied = seconds(lambda: target.copy_(source))
    # random numbers: products of equal ones take less power, and run at a higher clock
    matrix = torch.randn(side, side, device=kind).to(dtype)
    product = seconds(lambda: matrix @ matrix)
    return Device(
        name=torch.cuda.get_device_name() if cuda else "cpu",
        kind=kind,
        bytes_per_s=2 * elements * dtype.itemsize / copied,
        flops=2.0 * side**3 / product,
        memory_bytes=torch.cuda.get_device_properties(0).total_memory if cuda else 0,
    )


if __name__ == "__main__":
    say(asdict(this_device("tiny" in sys.argv)))
