"""What `llmspec tune` measured of kernels, found by what a group computes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from llmspec.compiler.errors import Refused
from llmspec.compiler.kernels.group import Group
from llmspec.compiler.kernels.naming import kernel_name
from llmspec.compiler.kernels.tiles import reduces_rows
from llmspec.dsl import Diagnostic
from llmspec.dsl.program import Cluster
from llmspec.dsl.tuned import TunedKernel

STRUCTURE_DIGITS = 8


def structure_of(group: Group) -> str:
    """Short, and the same for groups that the same kernel computes."""
    return hashlib.sha256(group.structure().encode()).hexdigest()[:STRUCTURE_DIGITS]


@dataclass(frozen=True, slots=True)
class Measured:
    """name: of the section. kernels: of one compute type. share: what a whole step keeps of their
    rates."""

    name: str = ""
    kernels: tuple[TunedKernel, ...] = ()
    share: float = 1.0

    def of(self, group: Group) -> TunedKernel | None:
        """The entry of this very structure before one of any that has the group's name.

        Errors: Refused for a tile that cannot be that kernel's."""
        if not self.kernels:
            return None
        name = kernel_name(group)
        found = [k for k in self.kernels if k.name == name and k.columns == group.columns]
        if not found:
            return None
        exact = structure_of(group)
        for wanted in (exact, None):
            for kernel in found:
                if kernel.structure == wanted:
                    self._check(group, kernel)
                    return kernel
        return None

    def _check(self, group: Group, kernel: TunedKernel) -> None:
        """Errors: Refused for a tile narrower than the rows that the kernel reduces."""
        both = ((group.written, kernel.forward), (group.distinct_gradients, kernel.backward))
        for roots, one in both:
            if one is not None and reduces_rows(roots) and one.columns < group.columns:
                raise Refused(
                    Diagnostic(
                        code="E0303",
                        message=f"a tile of `{kernel.name}` in `kernels {self.name}` has "
                        f"{one.columns} columns, and the kernel reduces rows of {group.columns}",
                        helps=("measure again: llmspec tune",),
                    )
                )

    def apart(self, group: Group) -> bool:
        """Whether PyTorch's own operators were faster than the kernel."""
        found = self.of(group)
        return found is not None and not found.fused

    def rates(self, group: Group) -> tuple[float | None, float | None]:
        """Bytes/s of both directions in a step; None: not measured."""
        found = self.of(group)
        if found is None:
            return None, None
        back = found.backward
        return self.share * found.forward.rate, self.share * back.rate if back else None


NOTHING = Measured()


def measured_of(cluster: Cluster, width: int, share: float = 1.0) -> Measured:
    """width: bytes of an element of the compute type."""
    found = cluster.kernels
    if found is None:
        return NOTHING
    return Measured(found.name, tuple(k for k in found.kernels if k.width == width), share)
