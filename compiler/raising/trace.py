"""A module into one flat graph of aten operators, and the values of those that are constant."""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind
from torch.utils._pytree import tree_map

from llmspec.compiler.errors import Unsupported
from llmspec.compiler.raising.recording import (
    RANDOM,
    Recording,
    recording_of,
    wide_defaults,
    widened,
)

LARGEST_CONSTANT = 2**28
"""Elements of the largest constant that is looked at (a mask of 11,000 tokens squared)."""

INLINED = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
"""Regions that export wraps: which argument is the wrapped graph."""

IGNORED = ("_assert_tensor_metadata", "sym_constrain_range_for_size", "_assert_async")


class Logits(nn.Module):
    """From token ids to the logits alone, whatever the model wraps them in."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        out = self.model(ids)
        if isinstance(out, Tensor):
            return out
        return out.logits if hasattr(out, "logits") else out[0]


def opname(node: fx.Node) -> str:
    """`add` of aten.add.Tensor; "" for what is no aten operator."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return target._schema.name.removeprefix("aten::")
    return ""


def module_path(node: fx.Node) -> str:
    """The module that the user's line stands in: `transformer.h.3.attn`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1].removeprefix("model").removeprefix(".") if paths else ""


def value_of(node: fx.Node) -> Any:
    return node.meta.get("val")


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


@dataclass(eq=False)
class Trace:
    """graph: flat, functional. parameters, buffers: placeholder -> name in the module. data: lifted
    tensors with their values. ids: the placeholder of token ids. output: the logits.
    """

    graph: fx.Graph
    output: fx.Node
    ids: fx.Node
    module: nn.Module
    recording: Recording
    parameters: dict[fx.Node, str] = field(default_factory=dict)
    buffers: dict[fx.Node, tuple[str, Tensor]] = field(default_factory=dict)
    data: dict[fx.Node, Tensor] = field(default_factory=dict)
    constants: dict[fx.Node, Tensor] = field(default_factory=dict)
    varying: set[fx.Node] = field(default_factory=set)

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the value depends on neither tokens nor parameters."""
        return node not in self.varying

    def constant(self, node: fx.Node) -> Tensor:
        """The value of a constant node, floating ones in float64.

        Errors: Unsupported when it cannot be computed.
        """
        if node in self.constants:
            return self.constants[node]
        if node in self.buffers:
            name, tensor = self.buffers[node]
            result = self.recording.value(name, tensor)
        elif node in self.data:
            data = self.data[node]
            result = data.double() if data.is_floating_point() else data
        else:
            result = self._computed(node)
        self.constants[node] = result
        return result

    def _computed(self, node: fx.Node) -> Tensor:
        known = value_of(node)
        if isinstance(known, Tensor) and known.numel() > LARGEST_CONSTANT:
            raise Unsupported(f"a constant of shape {tuple(known.shape)} is too large to look at")
        if opname(node).removesuffix("_") in RANDOM:
            raise Unsupported(f"random numbers in `{module_path(node)}`")
        if made := _likeness(node):
            return made
        args = fx.map_arg((node.args, node.kwargs), self.constant)
        args, options = tree_map(widened, args)
        with wide_defaults(), torch.no_grad():
            return node.target(*args, **options)  # type: ignore[operator]


LIKENESSES = {"ones_like": 1, "zeros_like": 0, "new_ones": 1, "new_zeros": 0}


def _likeness(node: fx.Node) -> Tensor | None:
    """A tensor filled with a number: only the shape comes from an operand."""
    name = opname(node)
    known = value_of(node)
    if name in LIKENESSES:
        fill: Any = LIKENESSES[name]
    elif name in ("full_like", "new_full"):
        fill = node.args[2 if name == "new_full" else 1]
    else:
        return None
    return torch.full(known.shape, fill, dtype=widened(known.dtype))


def _is_varying(node: fx.Node, varying: set[fx.Node]) -> bool:
    name = opname(node)
    if name in LIKENESSES or name in ("full_like", "new_full"):
        return False
    if name.removesuffix("_") in RANDOM or name.startswith(("rand", "bernoulli")):
        return True
    return any(n in varying for n in node.all_input_nodes)


class _Flattener:
    """Copies an exported graph, regions inlined, assertions dropped."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def run(self, module: fx.GraphModule, env: dict[fx.Node, Any], grad: bool) -> Any:
        for node in module.graph.nodes:
            if node.op == "placeholder" or node in env:
                continue
            if node.op == "output":
                return tree_map_nodes(node.args[0], env)
            if node.op == "get_attr":
                env[node] = getattr(module, str(node.target))
                continue
            env[node] = self._call(node, env, grad)
        raise AssertionError("an fx graph ends with its output")

    def _call(self, node: fx.Node, env: dict[fx.Node, Any], grad: bool) -> Any:
        name = str(node.target)
        if name in INLINED or getattr(node.target, "__name__", "") in INLINED:
            name = name if name in INLINED else node.target.__name__  # type: ignore[union-attr]
            at = INLINED[name]
            inner = env[node.args[at]]  # type: ignore[index]
            operands = [tree_map_nodes(a, env) for a in node.args[at + 1 :]]
            places = [n for n in inner.graph.nodes if n.op == "placeholder"]
            enabled = bool(node.args[0]) if "grad" in name else grad
            return self.run(inner, dict(zip(places, operands, strict=True)), enabled)
        if node.target is operator.getitem and isinstance(env[node.args[0]], list | tuple):  # type: ignore[index]
            return env[node.args[0]][node.args[1]]  # type: ignore[index]
        if opname(node) in IGNORED:
            return None
        new = self.graph.node_copy(node, lambda n: env[n])
        new.meta["no_grad"] = not grad
        return new


def tree_map_nodes(value: Any, env: dict[fx.Node, Any]) -> Any:
    return tree_map(lambda v: env[v] if isinstance(v, fx.Node) else v, value)


def _mutates(graph: fx.Graph) -> bool:
    names = (opname(n) for n in graph.nodes if n.op == "call_function")
    return any(n.endswith("_") and not n.endswith("__") and n != "detach_" for n in names)


def _exported(module: nn.Module, sequences: int, tokens: int) -> torch.export.ExportedProgram:
    mode = next((p.fake_mode for p in module.parameters() if isinstance(p, FakeTensor)), None)
    if mode is None:
        raise Unsupported("a module without parameters")
    with mode:
        ids = torch.zeros(sequences, tokens, dtype=torch.long)
    loggers = [logging.getLogger(n) for n in ("torch.export", "torch._export")]
    levels = [log.level for log in loggers]
    try:
        for log in loggers:
            log.setLevel(logging.ERROR)
        program = torch.export.export(Logits(module).train(), (ids,), strict=False)
        if _mutates(program.graph):
            program = program.run_decompositions({})
        return program
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise Unsupported(f"the model cannot be traced: {reason}") from error
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _plain_name(target: str) -> str:
    return target.removeprefix("model.")


def trace(module: nn.Module, sequences: int, tokens: int) -> Trace:
    """The training graph of a recorded module for ids [sequences, tokens].

    Errors: Unsupported, with the tracer's reason.
    """
    known = recording_of(module).traces
    if (sequences, tokens) not in known:
        known[sequences, tokens] = _traced(module, sequences, tokens)
    return known[sequences, tokens]


def _traced(module: nn.Module, sequences: int, tokens: int) -> Trace:
    program = _exported(module, sequences, tokens)
    flat = _Flattener()
    env: dict[fx.Node, Any] = {}
    parameters: dict[fx.Node, str] = {}
    buffers: dict[fx.Node, tuple[str, Tensor]] = {}
    data: dict[fx.Node, Tensor] = {}
    ids: fx.Node | None = None
    places = [n for n in program.graph.nodes if n.op == "placeholder"]
    names = {id(p): name for name, p in module.named_parameters()}
    for place, spec in zip(places, program.graph_signature.input_specs, strict=True):
        new = env[place] = flat.graph.node_copy(place)
        target = spec.target or ""
        match spec.kind:
            case InputKind.USER_INPUT:
                ids = new
            case InputKind.PARAMETER:
                parameters[new] = names[id(module.get_parameter(_plain_name(target)))]
            case InputKind.BUFFER:
                buffers[new] = (_plain_name(target), module.get_buffer(_plain_name(target)))
            case InputKind.CONSTANT_TENSOR:
                constant: Any = program.constants[target]
                if isinstance(constant, FakeTensor):
                    buffers[new] = (_plain_name(target), constant)
                else:
                    data[new] = constant
            case _:
                raise Unsupported(f"a traced input of kind {spec.kind}")
    outputs = flat.run(program.graph_module, env, True)
    assert ids is not None, "the traced model takes token ids"
    output = outputs[-1] if isinstance(outputs, tuple | list) else outputs
    varying = {ids, *parameters}
    for node in flat.graph.nodes:
        if node.op == "call_function" and _is_varying(node, varying):
            varying.add(node)
    return Trace(
        graph=flat.graph,
        output=output,
        ids=ids,
        module=module,
        recording=recording_of(module),
        parameters=parameters,
        buffers=buffers,
        data=data,
        varying=varying,
    )
