"""Optimizers that work in host memory: their state and a copy of the weights live there.

A step copies gradients out, updates on the CPU and copies weights back, bucket by bucket, so that
on a GPU the two copies run beside the update of the buckets between them.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from . import host
from .gradients import local_gradient
from .mesh import Mesh

_BUCKETS, _MAX_BUCKET_BYTES = 6, 64 * 2**20
_AHEAD = 3  # buckets of gradients in host memory at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bucket:
    parameters: list[nn.Parameter]
    group: int
    update: Optimizer  # of the copies


def on_host(optimizer: Optimizer, mesh: Mesh) -> "HostOptimizer":
    """The optimizer, which has done no step yet, with its work moved to the host."""
    return HostOptimizer(optimizer, mesh)


class HostOptimizer(Optimizer):
    """What the loop and checkpoints see: parameters and groups of the device, state of the host."""

    def __init__(self, inner: Optimizer, mesh: Mesh):
        super().__init__(inner.param_groups, inner.defaults)
        self.device, self.kind = mesh.device, type(inner).__name__
        self.moments = getattr(inner, "moments", None)
        self.copies: dict[nn.Parameter, Tensor] = {}
        self.out, self.back = host.Lane(mesh.device), host.Lane(mesh.device)
        self.buckets: list[_Bucket] = []
        host.use_all_cores(mesh.device)
        for number, parameters in _buckets(self.param_groups):
            for p in parameters:
                part = _local(p)
                self.copies[p] = host.empty(tuple(part.shape), part.dtype, mesh.device)
            update = self._of_copies(inner, self.param_groups[number], parameters)
            self.buckets.append(_Bucket(parameters=parameters, group=number, update=update))
        self.weights_changed()
        self.state = _State(self)  # type: ignore[assignment]
        self._staging: list[dict[torch.dtype, Tensor]] = [{} for _ in range(_AHEAD)]
        self._sizes = self._largest()

    def _of_copies(
        self, inner: Optimizer, group: dict[str, Any], parameters: list[nn.Parameter]
    ) -> Optimizer:
        """Like inner in everything but what it updates."""
        update = object.__new__(type(inner))
        update.__dict__.update(inner.__dict__)
        update.param_groups = [{**group, "params": [self.copies[p] for p in parameters]}]
        update.state = defaultdict(dict)
        update.__dict__["whole"] = {self.copies[p]: p for p in parameters}
        return update

    def _largest(self) -> dict[torch.dtype, int]:
        """Elements of each type in the bucket that has most of it."""
        found: dict[torch.dtype, int] = {}
        for bucket in self.buckets:
            own: dict[torch.dtype, int] = {}
            for copy in (self.copies[p] for p in bucket.parameters):
                own[copy.dtype] = own.get(copy.dtype, 0) + copy.numel()
            found |= {t: n for t, n in own.items() if n > found.get(t, 0)}
        return found

    def weights_changed(self) -> None:
        """The device's weights are others (a checkpoint was loaded): copy them."""
        with torch.no_grad():
            done = self.out.copy([(copy, _local(p)) for p, copy in self.copies.items()])
        host.process_awaits(done)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients are there already"
        left = [self._send(number) for number in range(min(_AHEAD, len(self.buckets)))]
        returned = None
        for number, bucket in enumerate(self.buckets):
            host.process_awaits(left[number])
            bucket.update.param_groups[0].update(
                {k: v for k, v in self.param_groups[bucket.group].items() if k != "params"}
            )
            bucket.update.step()
            returned = self.back.copy([(_local(p), self.copies[p]) for p in bucket.parameters])
            for p in bucket.parameters:
                self.copies[p].grad = None
            if number + _AHEAD < len(self.buckets):
                left.append(self._send(number + _AHEAD))
            self._own_state(bucket)
        host.device_awaits(returned)

    def _send(self, number: int) -> torch.cuda.Event | None:
        """Begin to copy a bucket's gradients to where the bucket _AHEAD before it had its own."""
        bucket, pairs = self.buckets[number], []
        wanted = [p for p in bucket.parameters if p.grad is not None]
        space = self._space(number % _AHEAD, wanted)
        for p in wanted:
            copy = self.copies[p]
            copy.grad = space[p]
            pairs.append((space[p], local_gradient(p)))
        return self.out.copy(pairs)

    def _space(self, number: int, wanted: list[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
        """A part of the staging memory for each gradient."""
        found, used = {}, dict.fromkeys(self._sizes, 0)
        for p in wanted:
            copy = self.copies[p]
            if copy.dtype not in self._staging[number]:
                whole = host.empty((self._sizes[copy.dtype],), copy.dtype, self.device)
                self._staging[number][copy.dtype] = whole
            start = used[copy.dtype]
            used[copy.dtype] += copy.numel()
            part = self._staging[number][copy.dtype][start : used[copy.dtype]]
            found[p] = part.view(copy.shape)
        return found

    def _own_state(self, bucket: _Bucket) -> None:
        for state in bucket.update.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    host.stands_on_host(value)


class _State:
    """`optimizer.state` by the device's parameters."""

    def __init__(self, optimizer: HostOptimizer):
        self._by_parameter = {
            p: (bucket.update, optimizer.copies[p])
            for bucket in optimizer.buckets
            for p in bucket.parameters
        }

    def __getitem__(self, p: nn.Parameter) -> dict[str, Any]:
        update, copy = self._by_parameter[p]
        return update.state[copy]

    def items(self) -> Iterator[tuple[nn.Parameter, dict[str, Any]]]:
        """Of those that have been updated."""
        return ((p, u.state[copy]) for p, (u, copy) in self._by_parameter.items() if u.state[copy])

    def get(self, p: Any, default: Any = None) -> Any:
        if p not in self._by_parameter:
            return default
        update, copy = self._by_parameter[p]
        return update.state.get(copy, default)


def _local(p: Tensor) -> Tensor:
    return p._local_tensor if isinstance(p, DTensor) else p.detach()


def _buckets(groups: list[dict[str, Any]]) -> list[tuple[int, list[nn.Parameter]]]:
    """(group, some of its parameters), all of about one size."""
    sizes = {p: _local(p).nbytes for group in groups for p in group["params"]}
    enough = min(sum(sizes.values()) / _BUCKETS, _MAX_BUCKET_BYTES)
    found = []
    for number, group in enumerate(groups):
        pending: list[nn.Parameter] = []
        for p in group["params"]:
            pending.append(p)
            if sum(sizes[q] for q in pending) >= enough:
                found.append((number, pending))
                pending = []
        if pending:
            found.append((number, pending))
    return found
