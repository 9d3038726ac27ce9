"""What `kernels NAME { … }` says: measured tiles and rates of a program's own kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedPass:
    """One direction of a kernel.

    rows, columns: of the tile that one program takes. stages: tiles that are on their way at once,
        where a program goes over several.
    rate: bytes/s with this tile, of what the kernel reads and writes; by_rule, eager: of the same
        bytes with the tile by rule, and by PyTorch's own operators; None: not measured.
    """

    rows: int
    columns: int
    warps: int
    stages: int = 1
    rate: float
    by_rule: float | None = None
    eager: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedKernel:
    """name: what it computes, as kernels.py has it without its number. columns: of a row.
    width: bytes of an element. structure: of which kernel of this name; None: of any.
    fused: whether the kernel was faster than PyTorch's own operators."""

    name: str
    columns: int
    width: int
    structure: str | None = None
    fused: bool = True
    forward: TunedPass
    backward: TunedPass | None = None

    @property
    def identity(self) -> tuple[object, ...]:
        return self.name, self.columns, self.width, self.structure


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedKernels:
    name: str
    kernels: tuple[TunedKernel, ...]
