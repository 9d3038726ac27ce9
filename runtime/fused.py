"""What fused kernels share: types, tiles, random bits, and Triton where there is one."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

triton: Any = None
tl: Any = None
if find_spec("triton") is not None:  # where it is not, CPUs run the plain functions
    triton, tl = import_module("triton"), import_module("triton.language")

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
"""Whether CPUs run the kernels too, in Triton's interpreter: slow, and float32 inside."""

ELEMENTS = 2048
"""Of a tile: 16 a thread of 4 warps, enough loads in flight to reach memory's rate."""
WIDEST = 1024
"""Columns of a tile where rows are not reduced."""


# --------------------------------------------------------------------------------------------------
# Operators


def operator(
    name: str,
    plain: Callable[..., Any],
    on_gpu: Callable[..., Any],
    gradients: Callable[..., Any] | None = None,
    keep: Callable[..., None] | None = None,
) -> Any:
    """A torch.library operator: `plain` on CPUs and for shapes and types, `on_gpu` on GPUs.

    keep(ctx, inputs, output), gradients(ctx, *gradients): its autograd.
    """
    on_cpu = on_gpu if INTERPRETED else plain
    made = torch.library.custom_op(f"kernels::{name}", on_cpu, mutates_args=(), device_types="cpu")
    made.register_kernel("cuda", on_gpu)
    made.register_fake(plain)
    if gradients is not None:
        made.register_autograd(gradients, setup_context=keep)
    return made


def wide(x: Tensor) -> Tensor:
    """As kernels load it: float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def turned(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) for the halves of the last dimension."""
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)


# --------------------------------------------------------------------------------------------------
# Triton


def jit(*names: str) -> Any:
    """triton.jit. names: of arguments that differ from layer to layer, which must not make a kernel
    of its own for each value."""

    def decorate(function: Any) -> Any:
        return function if triton is None else triton.jit(function, do_not_specialize=list(names))

    return decorate


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program of a kernel takes of rows × columns.

    stages: tiles that are on their way at once where a program goes over several of them.
    """

    rows: int
    columns: int
    warps: int
    of_columns: int
    stages: int = 1

    @property
    def options(self) -> dict[str, int]:
        return {"TILE_ROWS": self.rows, "TILE_COLUMNS": self.columns, "num_warps": self.warps}

    @property
    def across(self) -> int:
        return -(-self.of_columns // self.columns)

    def grid(self, rows: int) -> tuple[int, int]:
        """A program for each tile."""
        return -(-rows // self.rows), self.across

    def sums(self, rows: int, device: torch.device) -> tuple[int, int]:
        """Few enough programs that what each sums over its rows is soon added up: four for each
        multiprocessor."""
        processors = 4
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        down = min(-(-rows // self.rows), max(4 * processors // self.across, 1))
        return down, self.across


NOTHING: Mapping[Any, Any] = {}
Measured = Mapping[int, tuple[int, int, int, int]]
"""By columns of a tensor: rows and columns of the tile, warps, stages."""


def whole_rows(columns: int, measured: Measured = NOTHING) -> Tile:
    """For kernels that reduce rows: 16 numbers a thread where a row is wide."""
    if columns in measured:
        return _measured(columns, measured)
    whole = _power_of_two(columns)
    return Tile(max(ELEMENTS // whole, 1), whole, min(max(whole // 512, 4), 32), columns)


def flat(columns: int, measured: Measured = NOTHING) -> Tile:
    """For kernels whose elements stand for themselves."""
    if columns in measured:
        return _measured(columns, measured)
    wide = min(_power_of_two(columns), WIDEST)
    return Tile(ELEMENTS // wide, wide, 4, columns)


def _measured(columns: int, measured: Measured) -> Tile:
    rows, wide, warps, stages = measured[columns]
    return Tile(rows, wide, warps, columns, stages)


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


@jit()
def random_bits(stream, index):  # type: ignore[no-untyped-def]
    """64 random bits for each index: `random.bits` inside a kernel."""
    z = index.to(tl.uint64) * 0x9E3779B97F4A7C15 + stream.to(tl.uint64)
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)).to(tl.int64)
