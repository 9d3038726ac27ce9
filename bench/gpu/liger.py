"""Liger-Kernel's kernels beside ours, where it is installed and has one of the kind."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


def liger_forward(name: str, args: tuple[Any, ...]) -> Call | None:
    """The forward of the kernel that computes the same of the same tensors; None: there is none."""
    if importlib.util.find_spec("liger_kernel") is None or name not in KERNELS:
        return None
    given = [a for a in args if isinstance(a, Tensor)]
    call: Call | None = None
    try:
        call = KERNELS[name](*given)
        call()
    except Exception:  # another version of it: no number is better than a wrong one
        return None
    return call


def _rmsnorm(x: Tensor, weight: Tensor) -> Call:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return _no_grad(lambda: LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False))


def _residual_rmsnorm(x: Tensor, out: Tensor, weight: Tensor) -> Call:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return _no_grad(
        lambda: LigerFusedAddRMSNormFunction.apply(x, out, weight, 1e-5, 0.0, "llama", False)
    )


def _layernorm(x: Tensor, weight: Tensor, bias: Tensor) -> Call:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return _no_grad(lambda: LigerLayerNormFunction.apply(x, weight, bias, 1e-5))


def _silu_gate(gate: Tensor, up: Tensor) -> Call:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return _no_grad(lambda: LigerSiLUMulFunction.apply(gate, up))


def _no_grad(call: Call) -> Call:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


KERNELS: dict[str, Callable[..., Call]] = {
    "rmsnorm": _rmsnorm,
    "residual_rmsnorm": _residual_rmsnorm,
    "layernorm": _layernorm,
    "silu_gate": _silu_gate,
}
