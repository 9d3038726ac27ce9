"""Values in the shapes that operators need them in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from llmspec.compiler.ops import shape
from llmspec.compiler.raising.views import (
    REPEATED,
    Atom,
    View,
    whole,
)
from llmspec.compiler.raising.weights import Weights


class Layout(Weights):
    # ---------------------------------------------------------------------------- looks

    def resolved(self, view: View) -> View:
        """The same without picks on the last dimension."""
        while view.picks:
            atom, index = view.picks[0]
            last = len(view.node.meta["shape"]) - 1
            if atom.dim != last:
                return view
            size = view.node.meta["shape"][last]
            outer = size // (atom.stride * atom.size)
            stack = self.stacked(view.node, atom.size) if outer == 1 else None
            if stack is not None:
                node = self._select(stack, -2, index)
                view = View(node, view.axes, view.picks[1:])
                continue
            sizes = tuple(s for s in (outer, atom.size, atom.stride) if s > 1)
            node = self.unflattened(view.node, sizes)
            node = self._select(node, -1 if atom.stride == 1 else -2, index)
            view = _remapped(view, node, last, atom, outer > 1)
        return view

    def _select(self, node: fx.Node, dim: int, index: int) -> fx.Node:
        dims = node.meta["dims"]
        kept = dims and dims[:dim] + (dims[dim + 1 :] if dim != -1 else "")
        return self.once(
            ("select", node, dim, index),
            lambda: self._within(node, shape.select, node, dim, index, dims=kept),
        )

    def unflattened(self, node: fx.Node, sizes: tuple[int, ...]) -> fx.Node:
        if len(sizes) < 2:
            return node
        dims = node.meta["dims"]
        if dims:
            letters = "HE" if len(sizes) == 2 else "HNE"
            dims = dims[:-1] + letters if len(sizes) <= 3 else ""
        return self.once(
            ("unflatten", node, sizes),
            lambda: self._within(node, shape.unflatten, node, sizes, dims=dims),
        )

    def _within(
        self, like: fx.Node, function: Callable[..., Any], *args: Any, dims: str
    ) -> fx.Node:
        """Emits under the scope and label of the value that only changes its shape."""
        before, self.builder._scope = self.builder._scope, like.meta["scope"]
        node = self.builder.call(function, *args, label=like.meta["label"], dims=dims)
        self.builder._scope = before
        return node

    def apart(self, view: View) -> View | None:
        """With every atom a whole dimension; None when a dimension but the last is split."""
        view = self.resolved(view)
        sizes = view.node.meta["shape"]
        last = len(sizes) - 1
        atoms = [a for axis in view.axes for a in axis if a.dim != REPEATED]
        if view.picks or any(a.size != sizes[a.dim] for a in atoms if a.dim != last):
            return None
        own = sorted((a for a in atoms if a.dim == last), key=lambda a: (-a.stride, a.size))
        if len(own) < 2:
            return view
        node = self.unflattened(view.node, tuple(a.size for a in own))
        moved = {a: Atom(last + i, 1, a.size) for i, a in enumerate(own)}
        axes = tuple(tuple(moved.get(a, a) for a in axis) for axis in view.axes)
        return View(node, axes)

    def focused(self, view: View) -> View:
        """With the last axis the whole last dimension of its node."""
        view = self.resolved(view)
        last = len(view.node.meta["shape"]) - 1
        size = view.node.meta["shape"][-1]
        if not view.picks and view.axes[-1] == (Atom(last, 1, size),):
            return view
        split = self.apart(view)
        if split is not None:
            last = len(split.node.meta["shape"]) - 1
            dims = [a.dim for a in split.axes[-1]]
            if dims == [last]:
                return split
            if dims and dims == list(range(last + 1 - len(dims), last + 1)):
                node = self.flattened(split.node, len(dims))
                tail = len(node.meta["shape"]) - 1
                atom = Atom(tail, 1, node.meta["shape"][-1])
                return View(node, (*split.axes[:-1], (atom,)))
        return whole(self.exact(view))

    def flattened(self, node: fx.Node, count: int) -> fx.Node:
        dims = node.meta["dims"]
        kept = dims and dims[:-count] + dims[-count]
        return self.once(
            ("flatten", node, count),
            lambda: self._within(node, shape.flatten, node, count, dims=kept),
        )

    def plain(self, view: View) -> tuple[fx.Node, int] | None:
        """(a node whose dimensions are the view's axes, how many leading axes of 1 it lacks)."""
        view = self.resolved(view)
        split = view if _in_order(view, len(view.node.meta["shape"])) else self.apart(view)
        if split is None:
            return None
        lead = 0
        while lead < len(split.axes) and not split.axes[lead]:
            lead += 1
        axes = split.axes[lead:]
        rank = len(split.node.meta["shape"])
        if [a.dim for axis in axes for a in axis] != list(range(rank)):
            return None
        if any(len(axis) != 1 for axis in axes[:-1]):
            return None
        count = len(axes[-1]) if axes else 1
        return (self.flattened(split.node, count) if count > 1 else split.node), lead

    def exact(self, view: View) -> fx.Node:
        """A node in exactly the view's shape; moved by PyTorch's own operators where it must be."""
        plain = self.plain(view)
        if plain is not None and plain[0].meta["shape"] == view.shape:
            return plain[0]
        view = self.resolved(view)
        picked = dict(view.picks)
        atoms = [a for axis in view.axes for a in axis if a.dim != REPEATED] + list(picked)
        order = sorted(atoms, key=lambda a: (a.dim, -a.stride, a.size))
        node = self._reshape(view.node, tuple(a.size for a in order))
        for atom in sorted(picked, key=order.index, reverse=True):
            node = self.aten("select.int", [node, order.index(atom), picked[atom]])
            order.remove(atom)
        kept = [a for axis in view.axes for a in axis if a.dim != REPEATED]
        turn = tuple(order.index(a) for a in kept)
        if turn != tuple(range(len(turn))):
            node = self.aten("permute.default", [node, turn])
        flat = [a for axis in view.axes for a in axis]
        if any(a.dim == REPEATED for a in flat):
            node = self._reshape(node, tuple(1 if a.dim == REPEATED else a.size for a in flat))
            node = self.aten("expand.default", [node, tuple(a.size for a in flat)])
        return self._reshape(node, view.shape)

    def _reshape(self, node: fx.Node, sizes: tuple[int, ...]) -> fx.Node:
        if node.meta["shape"] == sizes:
            return node
        return self.aten("reshape.default", [node, sizes])


def _in_order(view: View, rank: int) -> bool:
    axes = [axis for axis in view.axes if axis]
    sizes = view.node.meta["shape"]
    whole_axes = [(Atom(d, 1, sizes[d]),) for d in range(rank)]
    return not view.picks and axes == whole_axes


def _remapped(view: View, node: fx.Node, last: int, picked: Atom, outer: bool) -> View:
    """Atoms of the last dimension, now (outer, picked, inner) with picked taken out."""
    block = picked.stride * picked.size

    def moved(atom: Atom) -> Atom:
        if atom.dim != last:
            return atom
        if atom.stride >= block:
            return Atom(last, atom.stride // block, atom.size)
        return Atom(last + 1 if outer else last, atom.stride, atom.size)

    axes = tuple(tuple(moved(a) for a in axis) for axis in view.axes)
    return View(node, axes, tuple((moved(a), i) for a, i in view.picks[1:]))
