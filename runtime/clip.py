"""Global gradient norm and clipping, on any mixture of plain, split and sharded parameters."""

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .gradients import local_gradient
from .mesh import Mesh


@torch.no_grad()
def clip_(
    parameters: Iterable[nn.Parameter],
    mesh: Mesh,
    max_norm: float | None,
    *,
    counted_elsewhere: Collection[nn.Parameter] = (),
    loss_scale: float = 1.0,
) -> Tensor:
    """Scale all gradients by max_norm / norm if norm > max_norm; returns the norm before (float64).

    loss_scale: what the loss was multiplied with; gradients are divided by it in the same pass, and
        the norm is that of the quotients. It is not finite if any gradient of any rank is not.
    max_norm: None only measures.
    counted_elsewhere: copies of tied weights that another pipeline rank counts; scaled as well.
    """
    with_gradient = [p for p in parameters if p.grad is not None]
    skip = {id(p) for p in counted_elsewhere}
    counted = [p for p in with_gradient if id(p) not in skip]
    norm = _norm(counted, mesh) / loss_scale
    scale = torch.ones_like(norm)
    if max_norm is not None:
        # the 1e-6 is that of torch.nn.utils.clip_grad_norm_
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if with_gradient and (max_norm is not None or loss_scale != 1.0):
        gradients = [local_gradient(p) for p in with_gradient]
        torch._foreach_mul_(gradients, (scale / loss_scale).to(gradients[0].device))
    return norm


def _norm(parameters: list[nn.Parameter], mesh: Mesh) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for p in parameters:
        norm = torch.linalg.vector_norm(local_gradient(p), dtype=torch.float64)
        total += norm.square() / _copies(p, mesh)
    if mesh.world.size > 1:
        dist.all_reduce(total, group=mesh.world.group)
    return total.sqrt()


def _copies(p: nn.Parameter, mesh: Mesh) -> int:
    """On how many ranks of one pipeline stage the same part lives."""
    copies = mesh.world.size // mesh.pipeline.size
    if isinstance(p, DTensor):
        for mesh_dim, placement in enumerate(p.placements):
            if hasattr(placement, "dim"):
                copies //= p.device_mesh.size(mesh_dim)
    return copies
