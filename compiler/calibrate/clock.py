"""Seconds of a call on one device, whatever else the machine does in the meantime."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2
LEAST, MOST = 5, 200
"""Calls that are timed, at least and at most."""
HIDDEN_S = 2e-2
"""A GPU sleeps so long before each call: the host has launched all of it by then, and what is
measured is the device's time. FSDP2's hooks of a few units take the host some milliseconds."""
CYCLES_PER_S = 1.5e9
"""About the clock of a GPU."""


class Clock:
    """seconds_each: for one measurement. wait: for the other processes. hidden_s: what the host may
    take to launch a call."""

    def __init__(
        self,
        device: torch.device,
        seconds_each: float,
        wait: Callable[[], Any],
        hidden_s: float = HIDDEN_S,
    ) -> None:
        self.device, self.seconds_each, self.wait = device, seconds_each, wait
        self.hidden_s = hidden_s
        self._engine_s: float | None = None

    def seconds(self, call: Callable[[], Any]) -> float:
        """The lower quartile: other load only ever adds."""
        for _ in range(WARM_UP):
            call()
        self.wait()
        return lower_quartile(self._times(call))

    def together_s(self, call: Callable[[], Any]) -> float:
        """Of a call that all processes make: each makes it equally often."""
        return self.in_turn_s(call)[0]

    def in_turn_s(self, *calls: Callable[[], Any]) -> tuple[float, ...]:
        """Of calls that all processes make one after the other, each equally often."""
        for call in calls * WARM_UP:
            call()
        once = sum(self._once(call) for call in calls)
        often = min(MOST, max(LEAST, int(self.seconds_each / max(once, 1e-7))))
        agreed = torch.tensor(often, device=self.device)
        torch.distributed.broadcast(agreed, 0)
        rounds = [[self._once(call) for call in calls] for _ in range(int(agreed))]
        return tuple(lower_quartile(list(times)) for times in zip(*rounds, strict=True))

    def engine_s(self) -> float:
        """What a call of autograd costs beside the operators that it runs."""
        if self._engine_s is None:
            x = torch.ones(1, device=self.device, requires_grad=True)
            y, gradient = x.view(1, 1), torch.ones(1, 1, device=self.device)

            def nothing() -> tuple[Tensor, ...]:
                return torch.autograd.grad(y, (x,), gradient, retain_graph=True)

            self._engine_s = lower_quartile(self._times(nothing))
        return self._engine_s

    def _times(self, call: Callable[[], Any]) -> list[float]:
        found: list[float] = []
        until = time.perf_counter() + self.seconds_each
        while len(found) < LEAST or (time.perf_counter() < until and len(found) < MOST):
            found.append(self._once(call))
        return found

    def _once(self, call: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            return self._on_gpu(call)
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s

    def _on_gpu(self, call: Callable[[], Any]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(self.hidden_s * CYCLES_PER_S))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def lower_quartile(times: list[float]) -> float:
    return sorted(times)[len(times) // 4]
