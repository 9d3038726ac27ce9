"""ZeRO 1-3 by FSDP2: parameters, gradients and optimizer state live in parts on the data ranks.

FSDP2 itself moves, for each unit: an all-gather of its parameters before its forward (and, ZeRO 3,
before its backward), a reduce-scatter of its gradients after its backward, and with replicas
an all-reduce of the scattered part.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from .gradients import partial_parameters, sum_over
from .mesh import Mesh
from .parameters import traits


class ShardedGradients:
    """Gradients are summed over mesh.reduction, not averaged.

    units: modules gathered as one; each must be *called* in the model's forward.
    zero: 1 parameters stay gathered from first to last micro-batch, gradients are whole until
        the last one reduces them; 2 gradients are reduced in every micro-batch; 3 parameters
        are gathered for each unit's forward and again for its backward.
    compute, reduce: dtypes of the gathered parameters and of the reduction; None: as stored.
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
    ):
        assert zero in (1, 2, 3), f"ZeRO {zero} does not shard parameters"
        self.model, self.mesh, self.level = model, mesh, zero
        traits(model)  # keeps them: fully_shard replaces the parameters
        self.partial = partial_parameters(model, mesh)
        stored = next(model.parameters()).dtype
        policy = MixedPrecisionPolicy(
            param_dtype=None if compute == stored else compute,
            reduce_dtype=None if reduce in (stored, None) and compute in (stored, None) else reduce,
            cast_forward_inputs=False,
        )
        taken: set[nn.Parameter] = set()
        for unit in (*units, model):
            fully_shard(
                unit,
                mesh=mesh.shard_devices(),
                mp_policy=policy,
                # the root's backward follows at once, except in a pipeline
                reshard_after_forward=zero == 3 and (unit is not model or mesh.pipeline.size > 1),
                # a unit's parameters may have their names elsewhere in the model
                ignored_params=taken if unit is model else None,
            )
            taken |= set(unit.parameters())
        for module in self._sharded():
            module.set_gradient_divide_factor(1.0)
            # a sum by name: the scaled one that the factor chooses otherwise is NCCL's alone
            module.set_force_sum_reduction_for_comms(True)

    def before_microbatch(self, micro: Any) -> None:
        """micro: a Turn, or anything else with `first` and `last`."""
        if micro.first:
            self.zero()
        reduce = getattr(micro, "reduce", None)
        reduce = micro.last or self.level > 1 if reduce is None else reduce
        root = cast(FSDPModule, self.model)
        root.set_is_last_backward(micro.last)
        root.set_requires_gradient_sync(reduce)
        # replicas: parts are summed over the shards each time, over the replicas once
        root.set_requires_all_reduce(micro.last)
        root.set_reshard_after_backward(micro.last or self.level == 3)

    def finish(self) -> None:
        """Gradients are whole sums (of this rank's part) after this."""
        if self.partial:
            named = dict(self.model.named_parameters())
            sum_over([named[name] for name in self.partial], self.mesh.tensor)

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

    def _sharded(self) -> list[FSDPModule]:
        """The root first: whichever is used first takes that part."""
        return [m for m in self.model.modules() if isinstance(m, FSDPModule)]
