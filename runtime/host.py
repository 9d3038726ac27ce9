"""Host memory beside the device's, and the copies between the two.

On a GPU host memory is pinned, and copies run on a stream of their own beside the computing. On
CPUs both are one memory: what stands for the host's is remembered, so that it can be told apart.
"""

import os
from collections.abc import Iterable
from weakref import WeakSet

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_HOST: WeakSet[torch.UntypedStorage] = WeakSet()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host memory that `device` copies to and from."""
    pinned = device.type == "cuda"
    return stands_on_host(torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned))


def stands_on_host(tensor: Tensor) -> Tensor:
    """The tensor, its memory counted as the host's from now on."""
    part = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    if part.device.type == "cpu":
        _HOST.add(part.untyped_storage())
    return tensor


def is_host(storage: torch.UntypedStorage) -> bool:
    """Whether these bytes are the host's, also where the device is a CPU."""
    return storage in _HOST


def use_all_cores(device: torch.device) -> None:
    """torchrun leaves each process one thread, too few for work that a GPU hands to the CPU."""
    if device.type == "cuda":
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks_here))


class Lane:
    """Copies in one direction, in order."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """Begin to copy each (target, source), after all that is queued on the current stream."""
        if self.stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self.stream.record_event()


def device_awaits(event: torch.cuda.Event | None) -> None:
    """What is queued from now on starts after the copies."""
    if event is not None:
        torch.cuda.current_stream().wait_event(event)


def process_awaits(event: torch.cuda.Event | None) -> None:
    """Return when the copies are done: the CPU may read what arrived."""
    if event is not None:
        event.synchronize()
