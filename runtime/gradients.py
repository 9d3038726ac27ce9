"""What both ways of data parallelism share: local gradients, and sums over tensor ranks."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .mesh import Axis, Mesh
from .parameters import traits


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """Which backward of an optimizer step comes next: `first` starts a sum, `last` ends it.

    reduce: whether sharded gradients are reduced after it; None leaves it to the ZeRO level.
    """

    first: bool
    last: bool
    reduce: bool | None = None


def local_gradient(p: nn.Parameter) -> Tensor:
    """The local part of p.grad, sharing its memory."""
    gradient = p.grad
    assert gradient is not None, f"a parameter of shape {tuple(p.shape)} has no gradient"
    return gradient._local_tensor if isinstance(gradient, DTensor) else gradient


def partial_parameters(model: nn.Module, mesh: Mesh) -> list[str]:
    """Names of the parameters whose gradients are partial sums over the tensor ranks."""
    if mesh.tensor.size == 1:
        return []
    wanted = traits(model)
    return [name for name, _ in model.named_parameters() if name in wanted and wanted[name].partial]


def sum_over(
    parameters: Iterable[nn.Parameter], axis: Axis, reduce: torch.dtype | None = None
) -> None:
    """Sum local gradients over the ranks in place: one all-reduce for each dtype.

    reduce: what they are summed in, if not in their own dtype.
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for p in parameters:
        gradient = local_gradient(p)
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for gradients in by_dtype.values():
        flat = torch.cat([g.reshape(-1) for g in gradients])
        flat = flat if reduce is None else flat.to(reduce)
        dist.all_reduce(flat, group=axis.group)
        parts = flat.split([g.numel() for g in gradients])
        sums = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(gradients, sums)
