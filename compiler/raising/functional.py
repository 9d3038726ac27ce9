"""Constants of a traced model as small graphs without inputs, to be computed again."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

from llmspec.compiler.errors import Unsupported
from llmspec.compiler.raising.recording import RANDOM, storage
from llmspec.compiler.raising.trace import Trace, opname

getitem = operator.getitem


def factory_options(node: fx.Node) -> dict[str, Any]:
    """Type and device of a tensor made from nothing, said even where the model left them out."""
    names = {a.name for a in node.target._schema.arguments}  # type: ignore[union-attr]
    made = node.meta["val"]
    options: dict[str, Any] = {"device": torch.device("cpu")} if "device" in names else {}
    if "dtype" in names and made.is_floating_point():
        options["dtype"] = torch.float32
    return options


def turns_floating(node: fx.Node) -> bool:
    """Whether an operator makes floating numbers of integers, in a type that nobody named."""
    made, sources = node.meta.get("val"), [n.meta.get("val") for n in node.all_input_nodes]
    if not isinstance(made, Tensor) or not made.is_floating_point() or "dtype" in node.kwargs:
        return False
    tensors = [s for s in sources if isinstance(s, Tensor)]
    return bool(tensors) and not any(t.is_floating_point() or t.is_complex() for t in tensors)


def recomputed(
    trace: Trace, node: fx.Node, then: Callable[[Tensor], Tensor] | None = None
) -> fx.Graph:
    """A functional aten graph without inputs whose output is the constant, or `then` of it.

    Errors: Unsupported when it depends on what cannot be computed again.
    """

    def run() -> Tensor:
        known: dict[fx.Node, Any] = {}

        def value(n: fx.Node) -> Any:
            if n not in known:
                known[n] = _value(trace, n, value)
            return known[n]

        return then(value(node)) if then else value(node)

    functional = torch.func.functionalize(run, remove="mutations")
    graph = make_fx(functional)().graph
    if any(n.op in ("get_attr", "placeholder") for n in graph.nodes):
        raise Unsupported("a constant that is read from data, not computed")
    return graph


def _value(trace: Trace, node: fx.Node, value: Any) -> Any:
    if node in trace.buffers:
        return _replayed(trace, *trace.buffers[node])
    if node in trace.data:
        data = trace.data[node]
        if data.numel() > 64:
            raise Unsupported("a constant tensor of more than 64 numbers written in the model")
        return torch.full((), data.item()) if data.numel() == 1 else _stacked(data)
    if opname(node) in ("detach_", "detach"):
        return value(node.args[0])
    if node.op != "call_function":
        raise Unsupported(f"a constant that depends on `{node.name}`")
    args, options = fx.map_arg((node.args, node.kwargs), value)
    return node.target(*args, **options)  # type: ignore[operator]


def _stacked(data: Tensor) -> Tensor:
    parts = [torch.full((), x, dtype=data.dtype) for x in data.flatten().tolist()]
    return torch.stack(parts).reshape(data.shape)


def _replayed(trace: Trace, name: str, wanted: Tensor) -> Tensor:
    """The buffer's own operations, on real tensors."""
    known: dict[int, Tensor] = {}
    bases: dict[int, Tensor] = {}

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:
            return known[id(value)]
        if storage(value) in bases:
            base = bases[storage(value)]
            return base.as_strided(value.shape, value.stride(), value.storage_offset())
        raise Unsupported(f"buffer `{name}` holds data that is not computed")

    for entry in trace.recording._slice(wanted):
        if entry.name.removesuffix("_") in RANDOM:
            raise Unsupported(f"buffer `{name}` holds random numbers")
        result = entry.function(*tree_map(real, entry.args), **tree_map(real, entry.options))
        leaves = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        for output, made in zip(entry.outputs, leaves, strict=True):
            known[id(output)] = made
            bases.setdefault(storage(output), made)
    return real(wanted)
