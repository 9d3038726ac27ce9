"""What each aten operator means in the dialect.

A rule that returns None leaves the node to the next; what no rule takes is taken over as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from llmspec.compiler.ops import elementwise
from llmspec.compiler.ops.embedding import embedding, positions
from llmspec.compiler.ops.norm import layer_norm, layer_norm_no_bias, rms_norm
from llmspec.compiler.raising import activations, attention, norms, rotary
from llmspec.compiler.raising.arithmetic import binary, with_number
from llmspec.compiler.raising.matching import argument, is_identity, scalar, sole_part
from llmspec.compiler.raising.trace import opname, shape_of, value_of
from llmspec.compiler.raising.unit import Rule, Table, UnitRaiser
from llmspec.compiler.raising.views import (
    Atom,
    View,
    axis_size,
    expanded,
    narrowed,
    permuted,
    repeat_interleaved,
    reshaped,
    selected,
    squeezed,
    transposed,
    unsqueezed,
    whole,
)

# --------------------------------------------------------------------------------------------------
# Looks


def _axis(node: fx.Node, position: int, default: int = 0) -> int:
    dim = argument(node, position, "dim", default)
    return dim if dim >= 0 else dim + len(shape_of(node.args[0]))  # type: ignore[arg-type]


def _source(r: UnitRaiser, node: fx.Node) -> View:
    return r.value(node.args[0])  # type: ignore[arg-type]


def identity(r: UnitRaiser, node: fx.Node) -> View | None:
    return _source(r, node) if is_identity(r.trace, node) else None


def _reshape(r: UnitRaiser, node: fx.Node) -> View | None:
    return reshaped(_source(r, node), shape_of(node))


def _transpose(r: UnitRaiser, node: fx.Node) -> View:
    a, b = (int(d) for d in node.args[1:3])  # type: ignore[arg-type]
    return transposed(_source(r, node), a, b)


def _matrix_transpose(r: UnitRaiser, node: fx.Node) -> View:
    view = _source(r, node)
    return transposed(view, -1, -2) if len(view.axes) > 1 else view


def _permute(r: UnitRaiser, node: fx.Node) -> View:
    view = _source(r, node)
    return permuted(view, [int(d) % len(view.axes) for d in node.args[1]])  # type: ignore[union-attr, arg-type]


def _unsqueeze(r: UnitRaiser, node: fx.Node) -> View:
    return unsqueezed(_source(r, node), int(node.args[1]))  # type: ignore[arg-type]


def _squeeze(r: UnitRaiser, node: fx.Node) -> View | None:
    if opname(node) == "squeeze" and len(node.args) == 2 and isinstance(node.args[1], int):
        view = _source(r, node)
        axis = node.args[1] % len(view.axes)
        return squeezed(view, axis) if axis_size(view.axes[axis]) == 1 else view
    return None


def _expand(r: UnitRaiser, node: fx.Node) -> View:
    return expanded(_source(r, node), shape_of(node))


def _repeat_interleave(r: UnitRaiser, node: fx.Node) -> View | None:
    times, dim = node.args[1], argument(node, 2, "dim")
    if not isinstance(times, int) or dim is None:
        return None
    view = _source(r, node)
    return repeat_interleaved(view, dim % len(view.axes), times)


def _stretch(r: UnitRaiser, view: View, axis: int, start: int, length: int) -> View | None:
    last = axis == len(view.axes) - 1
    if last and r.is_parted(view.node):
        return r.rows(view, start, start + length)
    found = narrowed(view, axis, start, length)
    if found is None and last:
        found = r.rows(view, start, start + length)
    return found


def _slice(r: UnitRaiser, node: fx.Node) -> View | None:
    axis = _axis(node, 1)
    size = shape_of(node.args[0])[axis]  # type: ignore[arg-type]
    start, step = argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    start = max(start + size, 0) if start < 0 else min(start, size)
    length = shape_of(node)[axis]
    if step != 1:
        return None
    return _stretch(r, _source(r, node), axis, start, length)


def _narrow(r: UnitRaiser, node: fx.Node) -> View | None:
    axis = _axis(node, 1)
    start = node.args[2]
    if not isinstance(start, int) or start < 0:
        return None
    return _stretch(r, _source(r, node), axis, start, shape_of(node)[axis])


def _select(r: UnitRaiser, node: fx.Node) -> View | None:
    axis, index = _axis(node, 1), int(node.args[2])  # type: ignore[arg-type]
    size = shape_of(node.args[0])[axis]  # type: ignore[arg-type]
    return selected(_source(r, node), axis, index % size)


def _getitem(r: UnitRaiser, node: fx.Node) -> View | None:
    """One result of a split, a chunk or an unbind."""
    several, index = node.args[0], int(node.args[1])  # type: ignore[arg-type]
    assert isinstance(several, fx.Node), "getitem picks from a node's results"
    name = opname(several)
    results = value_of(several)
    index %= len(results)
    default = {"split": 0, "chunk": 0, "split_with_sizes": 0, "unbind": 0}.get(name)
    if default is None:
        return None
    axis = _axis(several, 1 if name == "unbind" else 2)
    view = _source(r, several)
    if name == "unbind":
        return selected(view, axis, index)
    sizes = [tuple(x.shape)[axis] for x in results]
    return _stretch(r, view, axis, sum(sizes[:index]), sizes[index])


def _cat(r: UnitRaiser, node: fx.Node) -> View | None:
    only = sole_part(r.trace, node)
    return r.value(only) if only is not None else None


# --------------------------------------------------------------------------------------------------
# Linear maps


def _is_weight(r: UnitRaiser, value: Any) -> bool | None:
    """Of a parameter as a matrix: False as stored, True transposed; None: something else."""
    if not isinstance(value, fx.Node) or r.trace.is_constant(value):
        return None
    view = r.value(value)
    if view.node.op != "get_attr" or len(view.axes) != 2 or len(view.node.meta["shape"]) != 2:
        return None
    rows, columns = (Atom(d, 1, s) for d, s in enumerate(view.node.meta["shape"]))
    if view.axes == ((rows,), (columns,)):
        return False
    return True if view.axes == ((columns,), (rows,)) else None


def _name(r: UnitRaiser, value: Any) -> str:
    return r.names[r.value(value).node][0]


def _bias_name(r: UnitRaiser, value: Any) -> str | None:
    node = value
    if isinstance(node, fx.Node) and node in r.trace.parameters and len(shape_of(node)) == 1:
        return r.trace.parameters[node]
    return None


def _mapped(
    r: UnitRaiser, node: fx.Node, x: Any, weight: Any, bias: Any, *, input_first: bool
) -> View | None:
    """x times a weight that is applied as [O, I], or as [I, O] with `input_first`."""
    turned = _is_weight(r, weight)
    if turned is None or (bias is not None and _bias_name(r, bias) is None):
        return None
    view = r.focused(r.value(x))
    if len(view.axes) < 2:
        return None
    return r.linear(
        view,
        _name(r, weight),
        _bias_name(r, bias) if bias is not None else None,
        node,
        input_first=input_first != turned,
    )


def _linear(r: UnitRaiser, node: fx.Node) -> View | None:
    x, weight = node.args[:2]
    return _mapped(r, node, x, weight, argument(node, 2, "bias"), input_first=False)


def _matmul(r: UnitRaiser, node: fx.Node) -> View | None:
    if len(shape_of(node.args[1])) != 2:  # type: ignore[arg-type]
        return None
    return _mapped(r, node, node.args[0], node.args[1], None, input_first=True)


def _addmm(r: UnitRaiser, node: fx.Node) -> View | None:
    bias, x, weight = node.args[:3]
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return None
    return _mapped(r, node, x, weight, bias, input_first=True)


# --------------------------------------------------------------------------------------------------
# Embeddings and norms


def _embedding(r: UnitRaiser, node: fx.Node) -> View | None:
    table, ids = node.args[:2]
    special = argument(node, 2, "padding_idx", -1) >= 0 or any(node.args[3:])
    if table not in r.trace.parameters or special:
        return None
    weight = r.weight(r.trace.parameters[table], ("whole",))  # type: ignore[index]
    if r.trace.is_constant(ids):  # type: ignore[arg-type]
        return _positions(r, node, weight, r.trace.constant(ids))  # type: ignore[arg-type]
    view = r.value(ids)  # type: ignore[arg-type]
    plain = r.plain(view)
    if plain is None or plain[0].meta["shape"] != view.shape:
        return None
    dims = (plain[0].meta["dims"] or "BT") + "D"
    return whole(r.emit(embedding, plain[0], weight, label="x", at=node, dims=dims))


def _positions(r: UnitRaiser, at: fx.Node, weight: fx.Node, ids: Tensor) -> View | None:
    """Rows 0, 1, 2 … of a table, one per token."""
    tokens = r.input.meta["shape"][1]
    row = torch.arange(tokens)
    if r.input.meta["dims"] != "BT" or not ids.shape or ids.shape[-1] != tokens:
        return None
    if not torch.equal(ids.long(), row.expand(ids.shape)):
        return None
    node = r.emit(positions, r.input, weight, label="places", at=at, dims="TD")
    view = whole(node)
    for _ in ids.shape[:-1]:
        view = unsqueezed(view, 0)
    return expanded(view, (*ids.shape, view.shape[-1]))


def _parameters(r: UnitRaiser, *values: Any) -> tuple[fx.Node, ...] | None:
    kept = tuple(v for v in values if v is not None)
    return kept if all(v in r.trace.parameters for v in kept) else None


def _layer_norm(r: UnitRaiser, node: fx.Node) -> View | None:
    sizes = node.args[1]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    weights = _parameters(r, weight, bias)
    if weights is None or weight is None or len(sizes) != 1:  # type: ignore[arg-type]
        return None
    function = layer_norm if bias is not None else layer_norm_no_bias
    eps = float(argument(node, 4, "eps", 1e-5))
    return norms.norm(r, node, function, node.args[0], weights, eps)  # type: ignore[arg-type]


def _rms_norm(r: UnitRaiser, node: fx.Node) -> View | None:
    weight, eps = argument(node, 2, "weight"), argument(node, 3, "eps")
    weights = _parameters(r, weight)
    if not weights or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return None
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    return norms.norm(r, node, rms_norm, node.args[0], weights, eps)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------
# Element by element


def _unary(function: Callable[..., Any], *more: Any) -> Rule:
    def rule(r: UnitRaiser, node: fx.Node) -> View:
        view = r.resolved(_source(r, node))
        return replace(view, node=r.emit(function, view.node, *more, label="hidden", at=node))

    return rule


def _gelu(r: UnitRaiser, node: fx.Node) -> View:
    tanh = node.kwargs.get("approximate", "none") == "tanh"
    return _unary(elementwise.gelu_tanh if tanh else elementwise.gelu)(r, node)  # type: ignore[return-value]


def _power(r: UnitRaiser, node: fx.Node) -> View | None:
    if opname(node) == "pow" and node.args[1] != 2:
        return None
    view = r.resolved(_source(r, node))
    made = r.emit(elementwise.multiply, view.node, view.node, label="squared", at=node)
    return replace(view, node=made)


def _rsub(r: UnitRaiser, node: fx.Node) -> View | None:
    number = scalar(r.trace, node.args[1])
    if number is None or argument(node, 2, "alpha", 1) != 1:
        return None
    return with_number(r, node, elementwise.subtract, node.args[0], number, True)  # type: ignore[arg-type]


def _dropout(r: UnitRaiser, node: fx.Node) -> View:
    return r.dropped(r.resolved(_source(r, node)), float(node.args[1]), node)  # type: ignore[arg-type]


SHAPES: Table = {
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten"),
        (rotary.complex_rotary, rotary.written_turn_pairs, _reshape),
    ),
    **dict.fromkeys(("view_as", "reshape_as"), (_reshape,)),
    "transpose": (_transpose,),
    "swapaxes": (_transpose,),
    "t": (_matrix_transpose,),
    "numpy_T": (_matrix_transpose,),
    "mT": (_matrix_transpose,),
    "permute": (_permute,),
    "unsqueeze": (_unsqueeze,),
    "squeeze": (_squeeze,),
    "expand": (_expand,),
    "expand_as": (_expand,),
    "repeat_interleave": (_repeat_interleave,),
    "slice": (_slice,),
    "narrow": (_narrow,),
    "select": (_select,),
    "getitem": (_getitem,),
    "cat": (_cat, rotary.written_turn, rotary.written_rotary_halves),
    **dict.fromkeys(
        ("alias", "contiguous", "clone", "to", "_to_copy", "type_as", "detach_", "lift_fresh_copy"),
        (identity,),
    ),
}

VALUES: Table = {
    "linear": (_linear,),
    "matmul": (attention.written_attention, _matmul),
    "mm": (_matmul,),
    "bmm": (attention.written_attention,),
    "addmm": (_addmm,),
    "scaled_dot_product_attention": (attention.sdpa,),
    "embedding": (_embedding,),
    "layer_norm": (_layer_norm,),
    "rms_norm": (_rms_norm,),
    "gelu": (_gelu,),
    "relu": (_unary(elementwise.relu),),
    "silu": (_unary(elementwise.silu),),
    "tanh": (_unary(elementwise.tanh),),
    "sigmoid": (_unary(elementwise.sigmoid),),
    "neg": (_unary(elementwise.multiply, -1.0),),
    "pow": (_power,),
    "square": (_power,),
    "dropout": (identity, _dropout),
    "add": (rotary.written_rotary, norms.written_layer_norm, binary(elementwise.add)),
    "sub": (binary(elementwise.subtract),),
    "rsub": (_rsub,),
    "mul": (
        norms.written_rms_norm,
        norms.written_layer_norm_no_bias,
        activations.written_gelu,
        activations.written_silu,
        binary(elementwise.multiply),
    ),
    "div": (binary(elementwise.divide),),
}

TABLE: Table = SHAPES | VALUES
