"""How many bytes of tensors are alive, operator by operator, and which tensors those are."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmspec.compiler.dryrun.places import Place, Places

LIKE = torch.ops.aten.zeros_like.default
"""What it makes is where its operand is: an optimizer's state beside its parameter."""


class Origin(NamedTuple):
    """What made a storage, and the tensor that it was first."""

    operator: str
    place: Place
    dtype: str
    shape: tuple[int, ...]


class Stretch(NamedTuple):
    """Of some operators in a row: bytes at the fullest moment and at the end, each above the
    beginning. changes: (number of the storage, bytes more); to_peak: how many up to that moment,
    which `at` reached, at `place`."""

    rise: int
    change: int
    changes: tuple[tuple[int, int], ...]
    to_peak: int
    at: str
    place: Place


class LiveBytes(TorchDispatchMode):
    """Inside it `now` is the bytes of all storages alive that an operator has made, each once;
    `peak` the most so far, `peak_at` the operator that reached it.

    start: tensors that were there before.
    is_host: of a storage, whether it stands for host memory: those count in `host_now` and
        `host_peak` instead, from when they are first seen, or seen again.
    places: names the program's lines; without it nothing is told of where storages come from.
    """

    def __init__(
        self,
        start: Iterable[Tensor] = (),
        is_host: Callable[[torch.UntypedStorage], bool] = lambda storage: False,
        places: Places | None = None,
    ) -> None:
        super().__init__()
        self.is_host, self.places = is_host, places
        self.sizes: dict[int, int] = {}
        self.away: set[int] = set()
        self.blind = False
        self.now = self.peak = self.host_now = self.host_peak = 0
        self.peak_at, self.peak_place = "", Place()
        # the same of the stretch that is under way
        self.began = self.began_changes = 0
        self.high, self.high_at, self.high_place, self.high_changes = 0, "", Place(), 0
        # what came and went since `begin`: (number of the storage, bytes more)
        self.numbers: dict[int, int] = {}
        self.origins: list[Origin] = []
        self.before: dict[int, int] = {}
        self.changes: list[tuple[int, int]] = []
        self.changes_to_peak = 0
        for tensor in start:
            self.see(tensor)
        self.note("")

    def begin(self) -> None:
        """Forget the peak so far."""
        self.peak, self.peak_at, self.peak_place = 0, "", Place()
        numbers = self.numbers.items()
        self.before = {n: self.sizes[key] for key, n in numbers if key not in self.away}
        self.changes, self.changes_to_peak = [], 0
        self.begin_stretch()

    def begin_stretch(self) -> None:
        self.began, self.began_changes = self.now, len(self.changes)
        self.high, self.high_changes = self.now, len(self.changes)
        self.high_at, self.high_place = "", Place()

    def end_stretch(self) -> Stretch:
        return Stretch(
            self.high - self.began,
            self.now - self.began,
            tuple(self.changes[self.began_changes :]),
            self.high_changes - self.began_changes,
            self.high_at,
            self.high_place,
        )

    def repeat(self, stretch: Stretch) -> None:
        """As if it had run once more."""
        if self.now + stretch.rise > self.peak:
            self.peak, self.peak_at = self.now + stretch.rise, stretch.at
            self.peak_place = stretch.place
            self.changes_to_peak = len(self.changes) + stretch.to_peak
        self.changes.extend(stretch.changes)
        self.now += stretch.change

    def at_peak(self) -> Counter[Origin]:
        """Bytes of what was alive at the peak since `begin`, by what made it."""
        alive = Counter(self.before)
        for number, size in self.changes[: self.changes_to_peak]:
            alive[number] += size
        found: Counter[Origin] = Counter()
        for number, size in alive.items():
            found[self.origins[number]] += size
        return +found

    def see(self, tensor: Tensor, what: object = "", *, on_host: bool = False) -> None:
        if type(tensor).__name__ == "DTensor":
            tensor = tensor._local_tensor  # type: ignore[attr-defined]
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = 0
            weakref.finalize(storage, self._forget, key)
            if self.places is not None:
                self.numbers[key] = len(self.origins)
                place = self.places.now()
                made = Origin(str(what), place, str(tensor.dtype)[6:], tuple(tensor.shape))
                self.origins.append(made)
        if key not in self.away and (on_host or self.is_host(storage)):
            self.resize(key, 0)
            self.away.add(key)
        self.resize(key, storage.nbytes())

    def _is_away(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.away

    def resize(self, key: int, size: int) -> None:
        if key in self.sizes:
            self._add(key, size - self.sizes[key])
            self.sizes[key] = size

    def _forget(self, key: int) -> None:
        self._add(key, -self.sizes.pop(key))
        self.away.discard(key)
        self.numbers.pop(key, None)

    def _add(self, key: int, size: int) -> None:
        if key in self.away:
            self.host_now += size
            return
        self.now += size
        if size and key in self.numbers:
            self.changes.append((self.numbers[key], size))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and keeping it off takes as long as an operator

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "prim":
            return function(*args, **(kwargs or {}))  # asks for a device or a layout
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented  # its local operators come by themselves
        if self.places is not None:
            self.places.remember()
        out = function(*args, **(kwargs or {}))
        if self.blind:
            return out
        if isinstance(out, Tensor):
            self.see(out, function, on_host=function is LIKE and self._is_away(args[0]))
        else:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.see(leaf, function)
        self.note(function)
        return out

    def note(self, what: object) -> None:
        self.host_peak = max(self.host_peak, self.host_now)
        if self.now <= self.high and self.now <= self.peak:
            return
        place = self.places.now() if self.places is not None else Place()
        if self.now > self.high:
            self.high, self.high_changes = self.now, len(self.changes)
            self.high_at, self.high_place = str(what), place
        if self.now > self.peak:
            self.peak, self.changes_to_peak = self.now, len(self.changes)
            self.peak_at, self.peak_place = str(what), place

    def unseen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, what it makes not counted."""

        def unseen(*args: Any, **kwargs: Any) -> Any:
            before, self.blind = self.blind, True
            try:
                return function(*args, **kwargs)
            finally:
                self.blind = before

        return unseen

    def watch_host(self, host: Any) -> None:
        """`host`: a program's runtime.host. Its memory is the host's from its first byte on: what
        makes it is not seen to."""
        empty, stands_on_host = host.empty, host.stands_on_host

        def counted(tensor: Tensor) -> Tensor:
            self.see(stands_on_host(tensor))
            return tensor

        host.empty, host.stands_on_host = self.unseen(empty), counted


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


@contextmanager
def shapes_unseen(live: LiveBytes) -> Iterator[None]:
    """DTensor asks once for the whole shape of each operator's result, by tensors that never have
    memory; on fake tensors they look like any other."""
    propagator: Any = ShardingPropagator
    plain = propagator._propagate_tensor_meta_non_cached
    propagator._propagate_tensor_meta_non_cached = live.unseen(plain)
    try:
        yield
    finally:
        propagator._propagate_tensor_meta_non_cached = plain
