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

    @property
    def words(self) -> str:
        """As "3,100 GB/s, by rule 2,900, eager 2,000"."""
        said = [f"{self.rate / 1e9:,.4g} GB/s"]
        for what, rate in (("by rule", self.by_rule), ("eager", self.eager)):
            if rate is not None:
                said.append(f"{what} {rate / 1e9:,.4g}")
        return ", ".join(said)


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

    @property
    def use(self) -> str:
        """What runs the operators, in the language's word."""
        return "triton" if self.fused else "eager"

    @property
    def directions(self) -> tuple[tuple[str, TunedPass], ...]:
        """Those that were measured, by name."""
        forward = (("forward", self.forward),)
        return forward if self.backward is None else (*forward, ("backward", self.backward))


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedKernels:
    name: str
    kernels: tuple[TunedKernel, ...]
