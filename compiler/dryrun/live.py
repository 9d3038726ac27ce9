"""How many bytes of tensors are alive, operator by operator."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside it `now` is the bytes of all storages alive that an operator has made, each once;
    `peak` the most so far, `peak_at` the operator that reached it.

    start: tensors that were there before.
    is_host: of a storage, whether it stands for host memory: those count in `host_now` and
        `host_peak` instead, from when they are first seen, or seen again.
    """

    def __init__(
        self,
        start: Iterable[Tensor] = (),
        is_host: Callable[[torch.UntypedStorage], bool] = lambda storage: False,
    ) -> None:
        super().__init__()
        self.is_host = is_host
        self.sizes: dict[int, int] = {}
        self.away: set[int] = set()
        self.now = self.peak = self.host_now = self.host_peak = 0
        self.peak_at = ""
        for tensor in start:
            self.see(tensor)
        self.note("")

    def see(self, tensor: Tensor) -> None:
        if type(tensor).__name__ == "DTensor":
            tensor = tensor._local_tensor  # type: ignore[attr-defined]
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0
            weakref.finalize(storage, self._forget, key)
        if key not in self.away and self.is_host(storage):
            self.resize(key, 0)
            self.away.add(key)
        self.resize(key, storage.nbytes())

    def resize(self, key: int, size: int) -> None:
        if key in self.sizes:
            self._add(key, size - self.sizes[key])
            self.sizes[key] = size

    def _forget(self, key: int) -> None:
        self._add(key, -self.sizes.pop(key))
        self.away.discard(key)

    def _add(self, key: int, size: int) -> None:
        if key in self.away:
            self.host_now += size
        else:
            self.now += size

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented  # its local operators come by themselves
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        self.note(str(function))
        return out

    def note(self, what: str) -> None:
        self.host_peak = max(self.host_peak, self.host_now)
        if self.now > self.peak:
            self.peak, self.peak_at = self.now, what


@contextmanager
def resizes_seen(live: LiveBytes) -> Iterator[None]:
    """FSDP2 frees and fills parameters by resizing their storages, past the dispatcher; this tells
    `live` of it."""
    plain = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        out = plain(storage, size)
        live.resize(storage._cdata, size)
        live.note("gathering parameters")
        return out

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]
