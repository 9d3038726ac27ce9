"""What autograd keeps of a block waits in host memory from its forward to its backward.

A block's values leave while the next block computes, and are gone from the device when that one is
done, be it of another of the rank's models; they come back while the block after it runs backward.
So the device holds those of two blocks at a time. The block whose backward comes right after its
forward never leaves.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import host
from .mesh import Mesh
from .parameters import Casts

SMALLEST_SHARE = 16  # of the block's input: starting a copy of less takes longer than the copy


class HostActivations:
    """One per model. Weights, integers and small values stay on the device."""

    # of all models: its values are on the device and in host memory
    leaving: "ClassVar[_Visit | None]" = None

    def __init__(self, mesh: Mesh):
        self.device = mesh.device
        Casts.watched = True
        self.out, self.back = host.Lane(mesh.device), host.Lane(mesh.device)
        self.newest: _Visit | None = None
        self.seen: set[int] = set()  # blocks of this forward

    @contextmanager
    def keep(self, block: nn.Module, x: Tensor) -> Iterator[None]:
        """Around one call of `block(x)`."""
        if not torch.is_grad_enabled():
            yield
            return
        if id(block) in self.seen:  # the next micro-batch
            self.newest = None
            self.seen.clear()
        self.seen.add(id(block))
        visit = _Visit(self, block, x.nbytes // SMALLEST_SHARE, self.newest)
        with torch.autograd.graph.saved_tensors_hooks(visit.pack, unpack):
            yield
        self.newest = visit
        gone, HostActivations.leaving = HostActivations.leaving, visit
        if gone is not None:
            gone.leave()


class _Storage:
    """One storage that autograd keeps, flat: on the device, in host memory, or both."""

    def __init__(self, there: Tensor, copy: Tensor):
        self.there: Tensor | None = there
        self.copy = copy


class _Place:
    """A tensor that autograd keeps, as a view of its storage."""

    def __init__(self, visit: "_Visit", storage: _Storage, tensor: Tensor):
        self.visit, self.storage, self.dtype = visit, storage, tensor.dtype
        self.view = (tensor.shape, tensor.stride(), tensor.storage_offset())


class _Visit:
    """One forward of one block. Autograd alone keeps its storages alive."""

    def __init__(
        self, owner: HostActivations, block: nn.Module, smallest: int, before: "_Visit | None"
    ):
        self.owner, self.block, self.smallest, self.before = owner, block, smallest, before
        self.weights: set[int] | None = None
        self.storages: WeakValueDictionary[int, _Storage] = WeakValueDictionary()
        self.copied: torch.cuda.Event | None = None
        self.fetched = self.arrived = False

    def pack(self, tensor: Tensor) -> Any:
        if isinstance(tensor, DTensor) or not tensor.is_floating_point():
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.smallest or self._is_weight(storage):
            return tensor
        known = self.storages.get(storage._cdata)
        if known is None:
            known = self._copy_out(tensor, storage.nbytes())
            self.storages[storage._cdata] = known
        return _Place(self, known, tensor)

    @torch.no_grad()
    def _copy_out(self, tensor: Tensor, nbytes: int) -> _Storage:
        flat = tensor.as_strided((nbytes // tensor.element_size(),), (1,), 0)
        copy = host.empty(tuple(flat.shape), flat.dtype, self.owner.device)
        self.copied = self.owner.out.copy([(copy, flat)])
        return _Storage(flat, copy)

    def _is_weight(self, storage: torch.UntypedStorage) -> bool:
        """Of the parameters as the block sees them: gathered ones only while it runs."""
        if self.weights is None:
            parts = (
                p._local_tensor if isinstance(p, DTensor) else p for p in self.block.parameters()
            )
            self.weights = {part.untyped_storage()._cdata for part in parts}
        return storage._cdata in self.weights or storage in Casts.storages

    def leave(self) -> None:
        """Free the device's memory, once it is copied."""
        host.device_awaits(self.copied)
        for storage in self.storages.values():
            storage.there = None

    @torch.no_grad()
    def fetch(self) -> None:
        """Begin to bring everything back."""
        if self.fetched:
            return
        self.fetched = True
        leaving, HostActivations.leaving = HostActivations.leaving, None
        if leaving is not None and leaving is not self:
            leaving.leave()  # of another micro-batch, whose backward comes later
        pairs = []
        for storage in self.storages.values():
            if storage.there is None:
                storage.there = torch.empty_like(storage.copy, device=self.owner.device)
                pairs.append((storage.there, storage.copy))
        self.copied = self.owner.back.copy(pairs) if pairs else None

    def arrive(self) -> None:
        if not self.arrived:
            self.arrived = True
            self.fetch()
            host.device_awaits(self.copied)
            if self.before is not None:
                self.before.fetch()


def unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    assert isinstance(kept, _Place)
    kept.visit.arrive()
    flat = kept.storage.there
    assert flat is not None, "what arrived stays until autograd lets go of it"
    return flat.view(kept.dtype).as_strided(*kept.view)
