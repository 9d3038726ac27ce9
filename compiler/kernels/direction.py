"""One direction of a kernel: what it reads and writes, as its functions name them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from llmspec.compiler.kernels.group import Group, Input
from llmspec.compiler.ops.formula import Expr, in_order

SCALARS = {"stream": "int", "threshold": "int", "raised": "float"}
"""What a dropout draws its mask from, besides tensors."""
COUNTED = {"B": "SEQUENCES", "T": "TOKENS", "H": "HEADS", "K": "HEADS", "C": "TOKENS"}
"""Letters of dimensions in names of constants."""


@dataclass(eq=False)
class Direction:
    """roots: what it writes. reads: in the order of its arguments."""

    name: str
    group: Group
    roots: list[Expr]
    reads: list[tuple[str, Expr]]
    names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = {id(e): name for name, e in self.reads}

    @cached_property
    def order(self) -> list[Expr]:
        known = [e for _, e in self.reads]
        return known + in_order(self.roots, known)

    @cached_property
    def draws(self) -> bool:
        return any(e.op == "keep" for e in self.order)

    @cached_property
    def like(self) -> str:
        """A tensor of the whole shape."""
        return next(n for n, e in self.reads if e.rows and e.columns and self.full(e))

    def full(self, e: Expr) -> bool:
        found = self.input_of(e)
        return found is None or found.place.full

    def input_of(self, e: Expr) -> Input | None:
        return next((i for i in self.group.inputs if i.expr is e), None)

    def integer(self, e: Expr) -> bool:
        found = self.input_of(e)
        return found is not None and found.integer

    @property
    def scalars(self) -> dict[str, str]:
        return SCALARS if self.draws else {}

    @property
    def parameters(self) -> str:
        tensors = [f"{name}: Tensor" for name, _ in self.reads]
        return ", ".join([*tensors, *(f"{n}: {t}" for n, t in self.scalars.items())])

    @property
    def returns(self) -> str:
        return tuple_type(len(self.roots))

    @cached_property
    def row_sizes(self) -> dict[str, tuple[str, str]]:
        """Of values whose rows several of the grid's share, what finds them: `name //` and `name %`
        to (the constant's name, what it is in a launcher)."""
        out: dict[str, tuple[str, str]] = {}
        for name, e in self.reads:
            found = self.input_of(e)
            if found is None or not found.place.rows or found.place.full:
                continue
            first, stop, last = found.place.first, found.place.stop, len(self.group.whole) - 1
            if stop < last:
                out[f"{name} //"] = self._span(stop, last)
            if first:
                out[f"{name} %"] = self._span(first, stop)
        return out

    def _span(self, first: int, stop: int) -> tuple[str, str]:
        dims = str(self.group.members[0].meta["dims"])[first:stop].upper()
        words = [COUNTED.get(d, f"DIM_{first + i}") for i, d in enumerate(dims)]
        one = stop == first + 1
        size = f"shape[{first}]" if one else f"shape[{first}:{stop}].numel()"
        return "_".join(words) or f"DIMS_{first}", f"{self.like}.{size}"


def tuple_type(count: int) -> str:
    return "Tensor" if count == 1 else f"tuple[{', '.join(['Tensor'] * count)}]"


def forward_of(group: Group) -> Direction:
    return Direction(group.name, group, group.written, [(i.name, i.expr) for i in group.inputs])


def backward_of(group: Group) -> Direction | None:
    """None: every gradient is one that comes in."""
    if not group.distinct_gradients:
        return None
    reads = [(e.label, e) for e in group.read_backward]
    reads += [(i.name, i.expr) for i in group.kept_inputs]
    return Direction(f"{group.name}_backward", group, group.distinct_gradients, reads)
