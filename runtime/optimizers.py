"""PyTorch's optimizers over a model's parameters, with weight decay where it belongs."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .parameters import traits

Models = nn.Module | Sequence[nn.Module]  # one model, or the stages this rank holds


def adamw(
    model: Models,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    fused: bool = True,
) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups(model, weight_decay), lr=lr, betas=betas, eps=eps, fused=fused)


def sgd(
    model: Models,
    *,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> torch.optim.SGD:
    # the fused kernel does not know DTensors
    fused = not any(isinstance(p, DTensor) for _, p in named_parameters(model))
    return torch.optim.SGD(
        groups(model, weight_decay),
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        fused=fused,
        foreach=not fused,
    )


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def updated_by(optimizer: Optimizer, p: Tensor) -> Tensor:
    """What the optimizer works on in place of p: its copy in host memory, or p itself."""
    return getattr(optimizer, "copies", {}).get(p, p)


def kind_of(optimizer: Optimizer) -> str:
    return getattr(optimizer, "kind", type(optimizer).__name__)


def as_modules(model: Models) -> Sequence[nn.Module]:
    return [model] if isinstance(model, nn.Module) else model


def named_parameters(model: Models) -> Iterator[tuple[str, nn.Parameter]]:
    """Each parameter once, by its first name."""
    seen: set[nn.Parameter] = set()
    for module in as_modules(model):
        for name, p in module.named_parameters():
            if p not in seen:
                seen.add(p)
                yield name, p


def groups(model: Models, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors and what was declared `decay=False` do not.

    One fused kernel takes plain tensors or DTensors of one mesh, hence a group for each kind.
    """
    exempt: set[str] = set()
    for module in as_modules(model):
        exempt |= {name for name, kept in traits(module).items() if not kept.decay}
    found: dict[Any, dict[str, Any]] = {}
    for name, p in named_parameters(model):
        decay = weight_decay if p.ndim >= 2 and name not in exempt else 0.0
        devices = p.device_mesh if isinstance(p, DTensor) else None
        group = found.setdefault((decay, devices), {"params": [], "weight_decay": decay})
        group["params"].append(p)
    return list(found.values())
