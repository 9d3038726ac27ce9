"""Every kernel of an emitted program, and the joined loss, against float32 and against others.

A program's `kernels.py` holds each kernel in plain PyTorch beside it (`NAME_plain`). One training
step tells with which tensors each is called; the same tensors are given to both.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.gpu.measuring import Device, distance, peak_bytes, seconds
from llmspec.runtime.linear_loss import linear_cross_entropy_sum

Row = dict[str, Any]
ROUNDINGS = 4
"""Of the compute type: what a result of several rounded steps may be off by."""


@dataclass
class Recorder(TorchDispatchMode):
    """The first call of each operator that is not PyTorch's own: what it is, what it was given."""

    calls: dict[str, tuple[Any, tuple[Any, ...]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        own = getattr(function, "namespace", "aten")
        if own not in PYTORCH and function._opname not in self.calls:
            kept = tree_map_only(Tensor, lambda t: t.detach().clone(), args)
            self.calls[function._opname] = function, kept
        return function(*args, **(kwargs or {}))


PYTORCH = (
    "aten",
    "prims",
    "prim",
    "c10d",
    "_c10d_functional",
    "c10d_functional",
    "fsdp",
    "profiler",
)


def check_kernels(
    calls: dict[str, tuple[Any, tuple[Any, ...]]], module: Any, device: Device
) -> list[Row]:
    """`calls`: what a Recorder saw; `module`: the program's kernels. A kernel that is not called or
    has no plain form beside it is an error of the program."""
    return [
        _kernel(name, function, args, getattr(module, f"{name}_plain"), device)
        for name, (function, args) in calls.items()
    ]


def _kernel(
    name: str, function: Any, args: tuple[Any, ...], plain: Callable[..., Any], device: Device
) -> Row:
    wide = tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, args)
    got, wanted = _tensors(function(*args)), _tensors(plain(*wide))
    far = max(distance(g, w) for g, w in zip(got, wanted, strict=True))
    eps = max(torch.finfo(t.dtype).eps for t in got)
    moved = sum(t.numel() * t.element_size() for t in (*_tensors(args), *got))
    bound_s = moved / device.bytes_per_s
    row = _row(name, far, ROUNDINGS * eps, bound_s)
    row |= {"kernel_s": seconds(lambda: function(*args)), "eager_s": seconds(lambda: plain(*args))}
    if device.kind == "cuda":
        compiled = torch.compile(plain)
        row["compiled_s"] = seconds(lambda: compiled(*args))
    return row


def _row(name: str, far: float, allowed: float, bound_s: float) -> Row:
    return {
        "name": name,
        "error": far,
        "allowed": allowed,
        "right": far <= allowed,
        "bound_s": bound_s,
    }


def _tensors(value: Any) -> list[Tensor]:
    found = (t for t in tree_leaves(value) if isinstance(t, Tensor))
    return [t for t in found if t.is_floating_point()]


# --------------------------------------------------------------------------------------------------
# The loss


@dataclass(frozen=True, slots=True)
class LossSize:
    tokens: int
    width: int
    vocabulary: int
    rows: int


LOSSES = (
    LossSize(12 * 1024, 768, 50_304, 2560),  # GPT-2, nanoGPT's micro-batch
    LossSize(8192, 4096, 128_256, 1024),  # Llama 3 8B
    LossSize(8192, 4096, 128_256 // 8, 8320),  # of it, one of eight tensor ranks
)
TINY_LOSSES = (LossSize(96, 16, 384, 40),)


def check_losses(sizes: tuple[LossSize, ...], device: Device) -> list[Row]:
    return [_loss(size, device) for size in sizes]


def _loss(size: LossSize, device: Device) -> Row:
    torch.manual_seed(0)
    kind = device.kind
    x = torch.randn(1, size.tokens, size.width, device=kind).to(device.short)
    weight = (0.02 * torch.randn(size.vocabulary, size.width, device=kind)).to(device.short)
    x.requires_grad_(), weight.requires_grad_()
    targets = torch.randint(0, size.vocabulary, (1, size.tokens), device=kind)

    def joined() -> Tensor:
        return linear_cross_entropy_sum(x, weight, targets, rows=size.rows) / size.tokens

    def eager() -> Tensor:
        return F.cross_entropy(F.linear(x, weight).flatten(0, 1).float(), targets.flatten())

    def trained(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = weight.grad = None
            loss().backward()

        return run

    far = _loss_error(joined, x, weight, targets, size)
    operations = 6.0 * size.tokens * size.width * size.vocabulary
    name = f"loss of {size.tokens} tokens, width {size.width}, vocabulary {size.vocabulary}"
    row = _row(name, far, ROUNDINGS * torch.finfo(device.short).eps, operations / device.flops)
    others = {"kernel": joined, "eager": eager}
    if device.kind == "cuda":
        others["compiled"] = torch.compile(eager)
    if (liger := _liger(x, weight, targets)) is not None and device.kind == "cuda":
        others["liger"] = liger
    for words, loss in others.items():
        row[f"{words}_s"] = seconds(trained(loss), 5)
        row[f"{words}_peak_bytes"] = peak_bytes(trained(loss))
    return row


def _loss_error(
    joined: Callable[[], Tensor], x: Tensor, weight: Tensor, targets: Tensor, size: LossSize
) -> float:
    """Of the loss and both gradients, against float32 and whole logits of some tokens at a time."""
    loss = joined()
    got = torch.autograd.grad(loss, (x, weight))
    wide = weight.detach().float()
    of_x, of_weight = torch.empty_like(x, dtype=torch.float32), torch.zeros_like(wide)
    total = 0.0
    for start in range(0, size.tokens, 1024):
        part = x.detach()[:, start : start + 1024].float().requires_grad_()
        w = wide.requires_grad_()
        own = targets[:, start : start + 1024].flatten()
        one = F.cross_entropy(F.linear(part, w).flatten(0, 1), own, reduction="sum") / size.tokens
        total += float(one.detach())
        a, b = torch.autograd.grad(one, (part, w))
        of_x[:, start : start + 1024], of_weight = a, of_weight + b
    far = [
        abs(float(loss.detach()) - total) / total,
        distance(got[0], of_x),
        distance(got[1], of_weight),
    ]
    return max(far)


def _liger(x: Tensor, weight: Tensor, targets: Tensor) -> Callable[[], Tensor] | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(weight, x.flatten(0, 1), targets.flatten())
