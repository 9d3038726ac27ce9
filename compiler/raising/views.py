"""How a traced tensor looks at a dialect value: per axis, which parts of which dimension.

`view`, `transpose`, `expand`, `split` and their like only change the looks; nothing is computed
until an operator needs the value in a shape of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import fx

REPEATED = -1
"""The dimension of an atom that stands in no dimension: the value is repeated along it."""


class Atom(NamedTuple):
    """A factor of one dimension of the value: its index counts `stride` each, `size` times."""

    dim: int
    stride: int
    size: int


Axis = tuple[Atom, ...]


@dataclass(frozen=True, slots=True)
class View:
    """axes: of the traced tensor, each a product of atoms, major first; none: an axis of size 1.

    picks: atoms that are fixed at one index and in no axis.
    """

    node: fx.Node
    axes: tuple[Axis, ...]
    picks: tuple[tuple[Atom, int], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis_size(axis) for axis in self.axes)


def axis_size(axis: Axis) -> int:
    return math.prod(atom.size for atom in axis)


def whole(node: fx.Node) -> View:
    shape = node.meta["shape"]
    return View(node, tuple((Atom(d, 1, size),) for d, size in enumerate(shape)))


def merged(axis: Axis) -> Axis:
    """Neighbouring atoms that make one larger atom are written as one."""
    out: list[Atom] = []
    for atom in axis:
        last = out[-1] if out else None
        if last and last.dim == atom.dim != REPEATED and last.stride == atom.stride * atom.size:
            out[-1] = Atom(atom.dim, atom.stride, last.size * atom.size)
        else:
            out.append(atom)
    return tuple(out)


def _cut(atom: Atom, major: int) -> tuple[Atom, Atom]:
    """An atom of size major × minor as two."""
    minor = atom.size // major
    stride = 0 if atom.dim == REPEATED else atom.stride * minor
    return Atom(atom.dim, stride, major), Atom(atom.dim, atom.stride, minor)


def split_axis(axis: Axis, major: int) -> tuple[Axis, Axis] | None:
    """An axis of size major × minor as two axes; None when an atom stands across the cut."""
    rest = list(axis)
    taken: list[Atom] = []
    need = major
    while need > 1:
        if not rest:
            return None
        atom = rest.pop(0)
        common = math.gcd(need, atom.size)
        if common == atom.size:
            taken.append(atom)
        elif common == need:
            first, second = _cut(atom, need)
            taken.append(first)
            rest.insert(0, second)
        else:
            return None
        need //= common
    return tuple(taken), tuple(rest)


def reshaped(view: View, shape: Sequence[int]) -> View | None:
    """The view in another shape; None when it needs a copy that the atoms cannot say."""
    rest: Axis = merged(tuple(atom for axis in view.axes for atom in axis))
    axes: list[Axis] = []
    for position, size in enumerate(shape):
        if size == 1:
            axis: Axis = ()
            if rest and rest[0].size == 1:
                axis, rest = rest[:1], rest[1:]
            elif rest and position >= 2:
                # one head: a factor of the dimension that is split next
                axis = (_cut(rest[0], 1)[0],)
            axes.append(axis)
            continue
        while rest and rest[0].size == 1:
            rest = rest[1:]
        cut = split_axis(rest, size)
        if cut is None:
            return None
        axes.append(merged(cut[0]))
        rest = cut[1]
    return replace(view, axes=tuple(axes))


def permuted(view: View, order: Sequence[int]) -> View:
    return replace(view, axes=tuple(view.axes[i] for i in order))


def transposed(view: View, a: int, b: int) -> View:
    order = list(range(len(view.axes)))
    order[a], order[b] = order[b], order[a]
    return permuted(view, order)


def unsqueezed(view: View, at: int) -> View:
    at = at if at >= 0 else at + len(view.axes) + 1
    return replace(view, axes=(*view.axes[:at], (), *view.axes[at:]))


def expanded(view: View, shape: Sequence[int]) -> View:
    axes = ((),) * (len(shape) - len(view.axes)) + view.axes
    repeated = tuple(
        (Atom(REPEATED, 0, size),) if axis_size(axis) == 1 and size > 1 else axis
        for axis, size in zip(axes, shape, strict=True)
    )
    return replace(view, axes=repeated)


def repeat_interleaved(view: View, axis: int, times: int) -> View:
    axes = list(view.axes)
    axes[axis] = (*axes[axis], Atom(REPEATED, 0, times))
    return replace(view, axes=tuple(axes))


def narrowed(view: View, axis: int, start: int, length: int) -> View | None:
    """A stretch of one axis, when the axis is a stack of stretches of that length."""
    size = axis_size(view.axes[axis])
    if length == size:
        return view
    if length == 0 or size % length or start % length:
        return None
    cut = split_axis(view.axes[axis], size // length)
    if cut is None or len(cut[0]) != 1:
        return None
    picked = cut[0][0]
    axes = (*view.axes[:axis], cut[1], *view.axes[axis + 1 :])
    picks = view.picks
    if picked.dim != REPEATED:
        picks = (*picks, (picked, start // length))
    return replace(view, axes=axes, picks=picks)


def selected(view: View, axis: int, index: int) -> View | None:
    one = narrowed(view, axis, index, 1)
    if one is None:
        return None
    return replace(one, axes=(*one.axes[:axis], *one.axes[axis + 1 :]))


def squeezed(view: View, axis: int) -> View:
    return replace(view, axes=(*view.axes[:axis], *view.axes[axis + 1 :]))


def is_repeated(axis: Axis) -> bool:
    return any(atom.dim == REPEATED for atom in axis)
