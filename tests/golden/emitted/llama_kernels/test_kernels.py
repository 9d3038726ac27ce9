"""Emitted by llmspec from llama_kernels.llmspec. Spec fff24e7f24c9, plan 78b9b4.
Change the spec or the plan, then: llmspec compile llama_kernels.llmspec

Each Triton kernel against its plain function. Where there is a GPU: python test_kernels.py
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

import kernels

# the interpreter runs on CPUs: TRITON_INTERPRET=1 python test_kernels.py
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

GENERATOR = torch.Generator().manual_seed(1)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


def results(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def compare(name: str, *given: Tensor | float) -> None:
    """float32 in Triton against float64 in plain PyTorch, relative to the largest number."""
    there = [g.to(DEVICE) if isinstance(g, Tensor) else g for g in given]
    wide = [g.double() if isinstance(g, Tensor) and g.is_floating_point() else g for g in given]
    ours, theirs = getattr(kernels, f"{name}_triton"), getattr(kernels, f"{name}_plain")
    pairs = zip(results(ours(*there)), results(theirs(*wide)), strict=True)
    for number, (made, wanted) in enumerate(pairs):
        assert made.shape == wanted.shape, (name, number, made.shape, wanted.shape)
        error = (made.cpu().double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)
        assert error < 1e-5, f"{name}, result {number}: off by {error:.2g}"


def test_rmsnorm() -> None:
    compare("rmsnorm", normal(2, 5, 37), normal(37))
    compare("rmsnorm_backward", normal(2, 5, 37), normal(2, 5, 37), normal(37))


def test_rotary() -> None:
    compare("rotary", normal(2, 5, 3, 38), normal(5, 1, 38), normal(5, 1, 38))
    compare("rotary_backward", normal(2, 5, 3, 38), normal(5, 1, 38), normal(5, 1, 38))


def test_residual_rmsnorm() -> None:
    compare("residual_rmsnorm", normal(2, 5, 37), normal(2, 5, 37), normal(37))
    compare(
        "residual_rmsnorm_backward",
        normal(2, 5, 37),
        normal(2, 5, 37),
        normal(2, 5, 37),
        normal(37),
    )


def test_silu_gate() -> None:
    compare("silu_gate", normal(2, 5, 37), normal(2, 5, 37))
    compare("silu_gate_backward", normal(2, 5, 37), normal(2, 5, 37), normal(2, 5, 37))


if __name__ == "__main__":
    for name, check in list(globals().items()):
        if name.startswith("test_"):
            check()
            print(f"{name.removeprefix('test_')} is right")
