"""Random graphs of operators that kernels may compute, and kernels as a module that runs."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, fx

from llmspec.compiler.graph import Parameter, Unit
from llmspec.compiler.kernels.kernel import Kernel, pick
from llmspec.compiler.kernels.module import print_kernels
from llmspec.compiler.kernels.naming import name_kernels
from llmspec.compiler.ops import attention, elementwise, norm, weights
from llmspec.compiler.ops.dropout import MASKS, dropout
from llmspec.compiler.ops.registry import entry_of
from llmspec.compiler.passes.shard import shard_unit, whole_placement

ROOT = Path(__file__).parents[3]
SEED = 7


class Draft:
    """A unit that grows operator by operator, on meta tensors."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape, self.graph = shape, fx.Graph()
        self.values: dict[fx.Node, Tensor] = {}
        self.parameters: dict[str, Parameter] = {}
        self.inputs: list[str] = []

    def _with(self, node: fx.Node, value: Tensor, label: str, scope: tuple[str, ...]) -> fx.Node:
        self.values[node] = value
        node.meta |= {
            "shape": tuple(value.shape),
            "dims": "BTHED"[5 - value.dim() :],
            "label": label,
            "scope": scope,
            "span": None,
            "integer": not value.is_floating_point(),
        }
        return node

    def given(self, shape: tuple[int, ...], name: str = "") -> fx.Node:
        name = name or f"x{len(self.inputs)}"
        if name in self.inputs:
            return next(n for n in self.graph.nodes if n.target == name)
        self.inputs.append(name)
        kind = torch.int64 if name == "samples" else torch.float32
        value = torch.empty(shape, device="meta", dtype=kind)
        return self._with(self.graph.placeholder(name), value, name, ())

    def weight(self, size: int) -> fx.Node:
        path = f"w{len(self.parameters)}"
        node = self.graph.create_node("get_attr", path)
        made = Parameter(path=path, shape=(size,), dims="D", init=None)  # type: ignore[arg-type]
        self.parameters[path] = made
        node.meta["parameter"] = made
        return self._with(node, torch.empty(size, device="meta"), "weight", ())

    def call(self, function: Any, *args: Any, scope: tuple[str, ...] = ()) -> fx.Node:
        value = function(*(self.values.get(a, a) if isinstance(a, fx.Node) else a for a in args))
        node = self.graph.call_function(function, args)
        return self._with(node, value, function.__name__, scope)

    def unit(self, result: fx.Node) -> Unit:
        """As one tensor rank runs it."""
        self.graph.output(result)
        unit = Unit("layer", self.graph, tuple(self.inputs), parameters=self.parameters)
        return shard_unit(unit, whole_placement(unit), 1)


@st.composite
def units(draw: st.DrawFn) -> Unit:
    """A few operators on values of one shape, each of earlier values, some read more than once."""
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(2, 9)))
    if draw(st.booleans()):
        shape = (*shape[:2], draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3)))
    draft = Draft(shape)
    values = [draft.given(shape), draft.given(shape)]
    dropouts = 0

    def operand() -> fx.Node:
        return draw(st.sampled_from(values))

    def other() -> fx.Node | float:
        lower = [
            (*shape[-1:],),
            (1, *shape[1:]),
            shape[1:],
            (*shape[:-1], 1),
            (shape[0], *[1] * (len(shape) - 1)),
        ]
        kind = draw(st.sampled_from(["value", "number", "weight", "repeated"]))
        match kind:
            case "value":
                return operand()
            case "number":
                return draw(st.sampled_from([0.5, -2.0, 3.0]))
            case "weight":
                return draft.weight(shape[-1])
        return draft.given(draw(st.sampled_from(lower)))

    for _ in range(draw(st.integers(1, 7))):
        choices = ["unary", "binary", "binary", "norm", "dropout"]
        if len(shape) == 4:
            choices.append("rotary")
            choices += ["softmax"] * 2
        match draw(st.sampled_from(choices)):
            case "unary":
                function = draw(st.sampled_from(list(elementwise.ACTIVATIONS.values())))
                made = draft.call(function, operand())
            case "binary":
                names = ["add", "subtract", "multiply"]
                made = draft.call(
                    getattr(elementwise, draw(st.sampled_from(names))), operand(), other()
                )
            case "norm":
                rows = [draft.weight(shape[-1]) for _ in range(2)]
                name = draw(st.sampled_from(["rms_norm", "layer_norm", "layer_norm_no_bias"]))
                given = rows[: 1 + (name == "layer_norm")]
                made = draft.call(getattr(norm, name), operand(), *given, 1e-5)
            case "dropout":
                samples = draft.given(shape[:1], "samples")
                made = draft.call(dropout, operand(), samples, 0.4, dropouts)
                dropouts += 1
            case "softmax":
                causal = draw(st.booleans()) and shape[2] <= shape[3]
                window = draw(st.sampled_from([None, None, 2, 4]))
                window = window if shape[2] <= shape[3] else None  # every query sees a key
                made = draft.call(weights.masked_softmax, operand(), causal, window)
            case _:
                made = draft.call(attention.rotary, operand(), 100.0)
        values.append(made)
    result = values[-1]
    unread = [v for v in values if not v.users and v is not result]
    for value in unread:
        result = draft.call(elementwise.add, result, value, scope=("ends",))
    return draft.unit(result)


def groups_of(unit: Unit) -> dict[str, Any]:
    name_kernels([unit])
    found = [n.target.group for n in unit.calls() if isinstance(n.target, Kernel)]
    return {g.name: g for g in found}


def module_of(unit: Unit) -> ModuleType:
    """kernels.py of a fused unit, imported."""
    found = groups_of(unit)
    text = print_kernels(
        {n: (g, ["here"]) for n, g in found.items()}, header=["Kernels."], width=4, bytes_per_s=None
    )
    return load(text)


def load(text: str) -> ModuleType:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("kernels_under_test", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def run(unit: Unit, given: dict[str, Tensor], kernels: ModuleType | None = None) -> Tensor:
    """The unit's result; kernels by the calls that model.py would have."""
    from runtime import context, random, rotary

    known: dict[fx.Node, Any] = {}
    space = {
        "kernels": kernels,
        "Mask": random.Mask,
        "rotary_tables": rotary.rotary_tables,
        "query_places": context.query_places,
        "SEED": SEED,
        "self": SimpleNamespace(first_dropout=0, training=True),
    }

    def masks(x: Tensor, p: float, samples: Tensor, operator: int) -> Tensor:
        start, shape = (0,) * (x.dim() - 1), tuple(x.shape[1:])
        options = {"seed": SEED, "start": start, "shape": shape, "training": True}
        return random.dropout(x, p, samples, operator=operator, **options)

    token = MASKS.set(masks)
    try:
        for node in unit.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                known[node] = given[str(node.target)]
            elif node.op == "call_function" and isinstance(node.target, Kernel):
                names = {f"v{i}": known[a] for i, a in enumerate(node.args)}
                printed = entry_of(node).render(node, list(names), node.meta["localised"])
                known[node] = eval(printed.text, space | names)
            elif node.op == "call_function" and node.target is pick:
                known[node] = known[node.args[0]][node.args[1]]
            elif node.op == "call_function":
                known[node] = node.target(*fx.map_arg(node.args, known.__getitem__))  # type: ignore[operator]
    finally:
        MASKS.reset(token)
    return known[unit.result()]


def values_of(unit: Unit, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    out = {}
    for node in unit.graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            continue
        shape = node.meta["shape"]
        if node.meta["integer"]:
            out[str(node.target)] = torch.arange(shape[0])
        else:
            made = torch.randn(shape, generator=generator, dtype=torch.float64)
            out[str(node.target)] = made.to(dtype).requires_grad_()
    return out


def gradients(result: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = torch.randn(
        result.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    inputs = {n: v for n, v in given.items() if v.requires_grad}
    found = torch.autograd.grad(
        (result * weights.to(result.dtype)).sum(), list(inputs.values()), allow_unused=True
    )
    return {n: g for n, g in zip(inputs, found, strict=True) if g is not None}
