"""ZeRO 1-3 by FSDP2: parameters, gradients and optimizer state live in parts on the data ranks.

FSDP2 itself moves, for each unit: an all-gather of its parameters before its forward (and, ZeRO 3,
before its backward), a reduce-scatter of its gradients after its backward, and with replicas
an all-reduce of the scattered part. Experts that the expert ranks have split are units of their
own inside those, sharded over all the ranks that hold the same ones.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from . import host
from .fsdp_internals import finish_backward, reduce_unit, units_by_parameter
from .gradients import partial_parameters, sum_over
from .mesh import Mesh
from .parameters import is_expert, traits
from .split_backward import Product


class ShardedGradients:
    """Gradients are summed over mesh.reduction, not averaged; those of weights that the expert
    ranks have split, over mesh.expert_data.

    units: modules gathered as one, in the order of the forward; each must be *called* in it, and so
        must every module that holds weights of experts. Those stay as they are where no other rank
        has them.
    zero: 1 parameters stay gathered from first to last micro-batch, gradients are whole until
        the last one reduces them; 2 gradients are reduced in every micro-batch; 3 parameters
        are gathered for each unit's forward and again for its backward.
    compute, reduce: dtypes of the gathered parameters and of the reduction; None: as stored.
    on_host: the stored parts of parameters and gradients, and so the optimizer's state, live in
        host memory; with ZeRO 3, as gathered parameters are the device's.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        *,
        units: Iterable[nn.Module],
        zero: int,
        compute: torch.dtype | None = None,
        reduce: torch.dtype | None = None,
        on_host: bool = False,
    ):
        assert zero in (1, 2, 3), f"ZeRO {zero} does not shard parameters"
        self.model, self.mesh, self.level = model, mesh, zero
        self.reduce = reduce
        # backwards in two parts: a unit's gradients are not the same ones each time they are summed
        # over the shards, so that parts cannot wait for the replicas
        self.in_parts = False
        traits(model)  # keeps them: fully_shard replaces the parameters
        self.partial = partial_parameters(model, mesh)
        self.on_host, self.marked = on_host, False
        where = CPUOffloadPolicy(mesh.device.type == "cuda") if on_host else OffloadPolicy()
        if on_host:
            assert zero == 3, "only ZeRO 3 parts with gathered parameters"
            host.use_all_cores(mesh.device)
        stored = next(model.parameters()).dtype
        policy = MixedPrecisionPolicy(
            param_dtype=None if compute == stored else compute,
            reduce_dtype=None if reduce in (stored, None) and compute in (stored, None) else reduce,
            cast_forward_inputs=False,
        )
        kept: set[nn.Parameter] = set()
        if mesh.expert.size > 1 and mesh.expert_data.size == 1:
            kept = {p for p in model.parameters() if is_expert(p)}
        taken, units = set(kept), list(units)
        for unit in (*units, model):
            # the root's backward follows at once, except in a pipeline
            again = zero == 3 and (unit is not model or mesh.pipeline.size > 1)
            inner = [] if kept else _holders_of_experts(unit)
            for experts in inner:
                _shard(experts, mesh.expert_devices("expert_data"), policy, where, again)
            # a unit's parameters may have their names elsewhere in the model
            ignored = taken if unit is model else kept
            _shard(unit, mesh.shard_devices(), policy, where, again, ignored)
            # experts are gathered with the rest, not after their tokens have arrived
            cast(FSDPModule, unit).set_modules_to_forward_prefetch(cast(list[FSDPModule], inner))
            taken |= set(unit.parameters())
        # left to itself, the first unit's backward gathers what ended the micro-batch before
        for unit, before in zip(units, [*units[:1], *units], strict=False):
            cast(FSDPModule, unit).set_modules_to_backward_prefetch([cast(FSDPModule, before)])
        for module in self._sharded():
            module.set_gradient_divide_factor(1.0)
            # a sum by name: the scaled one that the factor chooses otherwise is NCCL's alone
            module.set_force_sum_reduction_for_comms(True)

    def before_microbatch(self, micro: Any) -> None:
        """micro: a Turn, or anything else with `first` and `last`."""
        if micro.first:
            self.zero()
        self._stand_on_host()
        reduce = getattr(micro, "reduce", None)
        reduce = micro.last or self.level > 1 if reduce is None else reduce
        root = cast(FSDPModule, self.model)
        root.set_is_last_backward(micro.last)
        root.set_requires_gradient_sync(reduce)
        # replicas: parts are summed over the shards each time, over the replicas once
        root.set_requires_all_reduce(micro.last or self.in_parts)
        root.set_reshard_after_backward(micro.last or self.level == 3)

    def weights(self, products: list[Product]) -> None:
        """The second part of a split backward, each unit reduced when its gradients are whole."""
        units = units_by_parameter(self.model)
        # None: weights that no other rank has are no unit's
        of_product = [units.get(product.parameter()) for product in products]
        left = Counter(map(id, of_product))
        for unit in of_product:
            products.pop(0).run()
            left[id(unit)] -= 1
            if unit is not None and not left[id(unit)]:
                reduce_unit(unit)
        finish_backward(self.model)

    def finish(self) -> None:
        """Gradients are whole sums (of this rank's part) after this."""
        if self.partial:
            named = dict(self.model.named_parameters())
            sum_over([named[name] for name in self.partial], self.mesh.tensor, self.reduce)

    def zero(self) -> None:
        """Only while no parameters are gathered: their gradients are others."""
        for p in self.model.parameters():
            p.grad = None

    def gather(self) -> None:
        """Begin to gather every unit's parameters."""
        for module in self._sharded():
            module.unshard(async_op=True)

    def release(self) -> None:
        """Free gathered parameters; optimizers and checkpoints must see the sharded ones."""
        for module in self._sharded():
            module.reshard()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """No gradients, no dropout inside."""
        self.model.eval()
        with torch.no_grad():
            yield
        self.release()
        self.model.train()

    def _stand_on_host(self) -> None:
        """On CPUs, where FSDP2's host memory is the device's: from the first micro-batch on."""
        if self.on_host and not self.marked and self.mesh.device.type == "cpu":
            self.marked = True
            for p in self.model.parameters():
                host.stands_on_host(p)
                p.register_post_accumulate_grad_hook(lambda q: host.stands_on_host(q.grad))

    def _sharded(self) -> list[FSDPModule]:
        """The root first: whichever is used first takes that part."""
        return [m for m in self.model.modules() if isinstance(m, FSDPModule)]


def _shard(
    module: nn.Module,
    devices: DeviceMesh,
    policy: MixedPrecisionPolicy,
    where: OffloadPolicy,
    again: bool,
    ignored: set[nn.Parameter] | None = None,
) -> None:
    ranks = devices.size(devices.ndim - 1)
    fully_shard(
        module,
        mesh=devices,
        mp_policy=policy,
        offload_policy=where,
        reshard_after_forward=again,
        ignored_params=ignored,
        shard_placement_fn=lambda p: _shard_dim(p, ranks),
    )


_MOST_PADDING = 1.125
"""Of a parameter's bytes, if the first dim is cut into equal parts."""


def _shard_dim(p: nn.Parameter, ranks: int) -> Shard:
    """The first dim, unless it is so short (a stack of a few matrices) that its parts would be
    unequal, and another divides.
    """
    shape = (p._local_tensor if isinstance(p, DTensor) else p).shape
    if -(-shape[0] // ranks) * ranks <= _MOST_PADDING * shape[0]:
        return Shard(0)
    return Shard(next((dim for dim, size in enumerate(shape) if size % ranks == 0), 0))


def _holders_of_experts(unit: nn.Module) -> list[nn.Module]:
    """The modules of a unit with such weights, those of units inside it left out."""
    return [
        module
        for module in unit.modules()
        if not isinstance(module, FSDPModule)
        and any(is_expert(p) for p in module.parameters(recurse=False))
    ]
