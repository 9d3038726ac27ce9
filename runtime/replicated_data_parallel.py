"""ZeRO 0: every data rank keeps whole gradients; their sums overlap with the backward."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .gradients import Turn, local_gradient, partial_parameters, sum_over
from .mesh import Axis, Mesh
from .parameters import is_expert
from .split_backward import Product

# Large enough to use the links, small enough for the first sums to start early: on two processes
# over Gloo, buckets of a sixth of a 13 MB model beat a single one by a tenth of the step.
_BUCKETS, _MAX_BUCKET_BYTES = 6, 25 * 2**20
_COPIES = 2  # buckets under way at a time in another dtype than their own


@dataclass(slots=True, kw_only=True)
class _Bucket:
    axis: Axis
    parameters: list[nn.Parameter]
    flat: Tensor
    views: list[Tensor]
    missing: int = 0  # gradients of this turn still to come
    reduced: Tensor | None = None  # flat, or its copy in the reduction's dtype
    work: Any = None


@dataclass(slots=True, kw_only=True)
class _State:
    turn: Turn = field(default_factory=lambda: Turn(first=True, last=True))
    launched: int = 0  # buckets whose sum is under way: the same order on all ranks


class ReplicatedGradients:
    """Sums gradients over mesh.reduction, in `reduce` if that is not their own dtype; those of
    weights that the expert ranks have split, over mesh.expert_data.

    Alone on its axis a process pays nothing: no hooks, no buckets.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, reduce: torch.dtype | None = None):
        self.model, self.mesh, self.reduce = model, mesh, reduce
        self.partial = partial_parameters(model, mesh)
        self.buckets: list[_Bucket] = []
        self.place: dict[nn.Parameter, tuple[int, int]] = {}
        self.state = _State()
        self.in_parts = False  # nothing depends on it here

    def before_microbatch(self, micro: Any) -> None:
        """micro: anything with `first` and `last` (see Turn)."""
        turn = Turn(first=micro.first, last=micro.last)
        self.state = _State(turn=turn)
        if turn.first:
            self.zero()
        if self.mesh.reduction.size == 1:
            return
        if not self.buckets:
            self._make_buckets()
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def weights(self, products: list[Product]) -> None:
        """The second part of a split backward; no other gradients of this turn are to come."""
        coming = Counter(product.parameter() for product in products)
        for bucket in self.buckets:
            bucket.missing = sum(coming[p] for p in bucket.parameters)
        while products:
            products.pop(0).run()

    def finish(self) -> None:
        """Gradients are whole sums after this."""
        for bucket in self.buckets[self.state.launched :]:
            self._launch(bucket)  # some parameter of it took no part in the loss
        for bucket in self.buckets:
            self._settle(bucket)
        if self.partial:
            named = dict(self.model.named_parameters())
            sum_over([named[name] for name in self.partial], self.mesh.tensor, self.reduce)

    def zero(self) -> None:
        for p in self.model.parameters():
            p.grad = None

    def gather(self) -> None:
        """Parameters are never sharded here."""

    def release(self) -> None:
        """Parameters are never sharded here."""

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """No gradients, no dropout inside."""
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.train()

    def _make_buckets(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        trained = [p for p in trained if self._axis(p).size > 1]
        enough = min(sum(map(_local_bytes, trained)) / _BUCKETS, _MAX_BUCKET_BYTES)
        pending: dict[Any, list[nn.Parameter]] = {}
        filled: dict[Any, int] = {}
        # the backward reaches the last parameters first
        for p in reversed(trained):
            kind = (p.dtype, is_expert(p))
            pending.setdefault(kind, []).append(p)
            filled[kind] = filled.get(kind, 0) + _local_bytes(p)
            if filled[kind] >= enough:
                self._add_bucket(pending.pop(kind))
                filled[kind] = 0
        for group in pending.values():
            self._add_bucket(group)

    def _axis(self, p: nn.Parameter) -> Axis:
        return self.mesh.expert_data if is_expert(p) else self.mesh.reduction

    def _add_bucket(self, parameters: list[nn.Parameter]) -> None:
        sizes = [_local(p).numel() for p in parameters]
        flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=self.mesh.device)
        views = [
            part.view(_local(p).shape)
            for part, p in zip(flat.split(sizes), parameters, strict=True)
        ]
        for i, p in enumerate(parameters):
            self.place[p] = (len(self.buckets), i)
            p.register_post_accumulate_grad_hook(self._accumulated)
        axis = self._axis(parameters[0])
        self.buckets.append(_Bucket(axis=axis, parameters=parameters, flat=flat, views=views))

    def _accumulated(self, p: nn.Parameter) -> None:
        number, i = self.place[p]
        bucket = self.buckets[number]
        _move_gradient(p, bucket.views[i])
        bucket.missing -= 1
        if not self.state.turn.last:
            return
        # a bucket that is complete early waits for the ones before it
        while self.state.launched < len(self.buckets):
            bucket = self.buckets[self.state.launched]
            if bucket.missing > 0:
                return
            self._launch(bucket)

    def _launch(self, bucket: _Bucket) -> None:
        self.state.launched += 1
        for p, view in zip(bucket.parameters, bucket.views, strict=True):
            if p.grad is None:
                view.zero_()
                _set_gradient(p, view)
        bucket.reduced = bucket.flat if self.reduce is None else bucket.flat.to(self.reduce)
        group = bucket.axis.group
        bucket.work = dist.all_reduce(bucket.reduced, group=group, async_op=True)
        if bucket.reduced is not bucket.flat and self.state.launched > _COPIES:
            # copies of all buckets at once would be as large as the gradients
            self._settle(self.buckets[self.state.launched - 1 - _COPIES])

    @staticmethod
    def _settle(bucket: _Bucket) -> None:
        """Wait for the bucket's sum."""
        if bucket.work is None or bucket.reduced is None:
            return
        bucket.work.wait()
        if bucket.reduced is not bucket.flat:
            bucket.flat.copy_(bucket.reduced)
        bucket.work = bucket.reduced = None


def _move_gradient(p: nn.Parameter, view: Tensor) -> None:
    """Let p.grad live in the bucket; later micro-batches then add to it in place."""
    gradient = local_gradient(p)
    if gradient is not view:
        view.copy_(gradient)
        _set_gradient(p, view)


def _set_gradient(p: nn.Parameter, view: Tensor) -> None:
    if not isinstance(p, DTensor):
        p.grad = view
        return
    p.grad = DTensor.from_local(
        view, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
    )


def _local(p: nn.Parameter) -> Tensor:
    return p._local_tensor if isinstance(p, DTensor) else p


def _local_bytes(p: nn.Parameter) -> int:
    return _local(p).numel() * p.element_size()
