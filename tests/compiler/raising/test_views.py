"""Random changes of looks, against PyTorch's own."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from llmspec.compiler.raising import views
from llmspec.compiler.raising.views import REPEATED, View


def seen(view: View, value: Tensor) -> Tensor:
    """The tensor that a view is of a value, read index by index."""
    strides = value.contiguous().stride()
    base = sum(index * atom.stride * strides[atom.dim] for atom, index in view.picks)
    places = torch.tensor(base)
    for axis in view.axes:
        along = torch.zeros(1, dtype=torch.long)
        for atom in axis:
            step = 0 if atom.dim == REPEATED else atom.stride * strides[atom.dim]
            along = (along[:, None] + torch.arange(atom.size) * step).flatten()
        places = places[..., None] + along
    return value.flatten()[places]


def changes(data: st.DataObject, view: View, x: Tensor) -> tuple[View | None, Tensor]:
    """One change, to the view and to the tensor."""
    kinds = ["permute", "unsqueeze", "split", "merge", "narrow", "select", "expand"]
    axis = data.draw(st.integers(0, x.dim() - 1))
    size = x.shape[axis]
    match data.draw(st.sampled_from(kinds)):
        case "permute":
            order = data.draw(st.permutations(range(x.dim())))
            return views.permuted(view, order), x.permute(order)
        case "unsqueeze":
            return views.unsqueezed(view, axis), x.unsqueeze(axis)
        case "split":
            factor = data.draw(st.sampled_from([f for f in range(1, size + 1) if size % f == 0]))
            shape = (*x.shape[:axis], factor, size // factor, *x.shape[axis + 1 :])
            return views.reshaped(view, shape), x.reshape(shape)
        case "merge":
            shape = (*x.shape[:axis], math.prod(x.shape[axis:]))
            return views.reshaped(view, shape), x.reshape(shape)
        case "narrow":
            length = data.draw(st.integers(1, size))
            start = data.draw(st.integers(0, size - length))
            return views.narrowed(view, axis, start, length), x.narrow(axis, start, length)
        case "select" if x.dim() > 1:
            index = data.draw(st.integers(0, size - 1))
            return views.selected(view, axis, index), x.select(axis, index)
        case _ if size == 1:
            shape = (*x.shape[:axis], 3, *x.shape[axis + 1 :])
            return views.expanded(view, shape), x.expand(shape)
    return view, x


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_views_are_what_pytorch_sees(data: Any) -> None:
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=3))
    value = torch.arange(math.prod(shape)).reshape(shape)
    node = fx.Graph().placeholder("x")
    node.meta["shape"] = tuple(shape)
    view, x = views.whole(node), value
    for _ in range(data.draw(st.integers(1, 6))):
        changed, x = changes(data, view, x)
        if changed is None:
            return
        view = changed
        assert view.shape == tuple(x.shape)
        assert torch.equal(seen(view, value), x)
        if x.dim() > 6 or x.numel() > 2000:
            return
