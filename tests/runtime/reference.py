"""The tiny model on one device, and whether a part of a mesh agrees with it."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from llmspec.runtime.gradients import local_gradient
from llmspec.runtime.initialise import block_offsets, fill
from llmspec.runtime.mesh import Mesh
from tests.runtime import tiny

ROWS = 24  # of the global batch


@dataclass(frozen=True, kw_only=True)
class Reference:
    loss: torch.Tensor
    evaluated: torch.Tensor
    parameters: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    norm: torch.Tensor


def one_device() -> Reference:
    parameters = {}
    for name, shape in tiny.SHAPES.items():
        whole = torch.empty(shape, dtype=tiny.TYPE)
        fill(whole, shape, (0,) * len(shape), tiny.init_of(name), tiny.SEED, name)
        parameters[name] = whole.requires_grad_()
    tokens, targets = tiny.global_batch(ROWS)
    loss = tiny.reference_loss(parameters, tokens, targets, True)
    loss.backward()
    gradients = {name: p.grad for name, p in parameters.items()}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    evaluated = tiny.reference_loss(parameters, tokens, targets, False).detach()
    return Reference(
        loss=loss.detach(),
        evaluated=evaluated,
        parameters=parameters,
        gradients=gradients,
        norm=norm,
    )


def own_block(whole: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    if not isinstance(p, DTensor):
        return whole
    for dim, (start, size) in enumerate(zip(block_offsets(p), p._local_tensor.shape, strict=True)):
        whole = whole.narrow(dim, min(start, whole.shape[dim]), size)
    return whole


def local_batch(mesh: Mesh) -> tiny.Batch:
    tokens, targets = tiny.global_batch(ROWS)
    return tiny.Batch(
        tokens=tokens, targets=targets, data_rank=mesh.data.rank, data_size=mesh.data.size
    )


def check_loss(loss: torch.Tensor, expected: torch.Tensor, mesh: Mesh, last: int | None = None):
    """`last`: the pipeline rank of the last stage, where that is not the last rank."""
    total = loss.clone()
    if mesh.data.size > 1:
        torch.distributed.all_reduce(total, group=mesh.data.group)
    if mesh.pipeline.rank == (mesh.pipeline.size - 1 if last is None else last):
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    else:
        assert loss == 0


def check_gradients(model: nn.Module, reference: Reference, scale: float):
    floor = 1e-6 * reference.norm * scale
    for name, p in model.named_parameters():
        expected = own_block(reference.gradients[name], p) * scale
        gradient = local_gradient(p)
        assert gradient is not None, f"{name} has no gradient"
        error = (gradient - expected).norm()
        assert error <= 1e-9 * max(expected.norm(), floor), f"{name}: {error / expected.norm()}"
