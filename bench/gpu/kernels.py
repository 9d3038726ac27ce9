"""Every kernel of an emitted program, and the joined loss, against float32 and against others.

A program's `kernels.py` holds each kernel in plain PyTorch beside it (`NAME_plain`). One training
step tells with which tensors each is called; the same tensors are given to both.

`python -m bench.gpu.kernels DEVICE [tiny]` is the loss, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.gpu.liger import liger_forward
from bench.gpu.measuring import Device, distance, peak_bytes, seconds
from bench.gpu.processes import Row, say
from llmspec.runtime.linear_loss import linear_cross_entropy_sum

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
) -> Iterator[Row]:
    """`calls`: what a Recorder saw; `module`: the program's kernels. A kernel that fails or has no
    plain form beside it is an error of the program; what it costs under torch.compile comes last,
    when all else is known."""
    rows: dict[str, Row] = {}
    for name, (function, args) in calls.items():
        try:
            rows[name] = _kernel(name, function, args, getattr(module, f"{name}_plain"), device)
        except Exception as error:  # of any kind: the others are still to be looked at
            rows[name] = {"name": name, "right": False, "failed": words_of(error)}
        yield rows[name]
    for name, (_, args) in calls.items() if device.kind == "cuda" else ():
        if "failed" not in rows[name]:
            yield rows[name] | _compiled(getattr(module, f"{name}_plain"), args)


def words_of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def _compiled(plain: Callable[..., Any], args: tuple[Any, ...]) -> Row:
    try:
        compiled = torch.compile(plain)
        return {"compiled_s": seconds(lambda: compiled(*args))}
    except Exception as error:  # of Inductor's: no fault of the kernel
        return {"note": f"torch.compile: {words_of(error)}"}


def _kernel(
    name: str, function: Any, args: tuple[Any, ...], plain: Callable[..., Any], device: Device
) -> Row:
    wide = tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, args)
    got, wanted = _tensors(function(*args)), _tensors(plain(*wide))
    far = max(distance(g, w) for g, w in zip(got, wanted, strict=True))
    eps = max(torch.finfo(t.dtype).eps for t in got)
    moved = sum(t.numel() * t.element_size() for t in (*_tensors(args), *got))
    row = _row(name, far, ROUNDINGS * eps, moved / device.bytes_per_s)
    row |= {"kernel_s": seconds(lambda: function(*args)), "eager_s": seconds(lambda: plain(*args))}
    row["of_copy"] = row["bound_s"] / row["kernel_s"]
    if device.kind == "cuda" and (theirs := liger_forward(name, args)) is not None:
        row["liger_s"] = seconds(theirs)
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


def check_losses(sizes: tuple[LossSize, ...], device: Device) -> Iterator[Row]:
    for size in sizes:
        try:
            yield from _loss(size, device)
        except Exception as error:  # of any kind: the others are still to be looked at
            yield {"name": str(size), "right": False, "failed": words_of(error)}


def _loss(size: LossSize, device: Device) -> Iterator[Row]:
    """Its row, and again with each of the others; torch.compile, which takes long, comes last."""
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
        if (liger := _liger(x, weight, targets)) is not None:
            others["liger"] = liger
        others["compiled"] = torch.compile(eager)
    for words, loss in others.items():
        try:
            row[f"{words}_s"] = seconds(trained(loss), 5)
            row[f"{words}_peak_bytes"] = peak_bytes(trained(loss))
        except Exception as error:
            if words == "kernel":
                raise
            row["note"] = f"{words}: {words_of(error)}"
        yield dict(row)


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


if __name__ == "__main__":
    for found in check_losses(
        TINY_LOSSES if "tiny" in sys.argv else LOSSES, Device(**json.loads(sys.argv[1]))
    ):
        say(found)
