"""A raised unit's graph as a reader would write it: order, names, letters of dimensions."""

from __future__ import annotations

from torch import fx

from llmspec.compiler.ops.attention import attention, rotary
from llmspec.compiler.ops.embedding import embedding, positions
from llmspec.compiler.ops.linear import linear
from llmspec.compiler.ops.projection import projection
from llmspec.compiler.ops.shape import select, unflatten

LOOKS = (select, unflatten, rotary)


def name_heads(graph: fx.Graph) -> None:
    """What attention reads is called q, k and v as soon as it is one of them alone."""
    for node in graph.nodes:
        if node.target is not attention:
            continue
        for letter, operand, dims in zip("qkv", node.args, ("BTHE", "BTKE", "BTKE"), strict=False):
            grouped = operand.meta["shape"] != node.args[0].meta["shape"]
            here = operand
            while here.target in LOOKS and len(here.users) == 1:
                here.meta["label"] = letter
                if len(here.meta["shape"]) == 4:
                    here.meta["dims"] = dims if grouped else "BTHE"
                here = here.args[0]


def _name(node: fx.Node) -> str:
    if node.op == "get_attr":
        return str(node.target).replace(".", "_")
    if node.op == "placeholder":
        return str(node.target)
    return "_".join((*node.meta["scope"], node.meta["label"]))


def tidied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """(the same graph, fresh names, each parameter just before its first use; old -> new)."""
    out = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:
            args = fx.map_arg(node.args, copy)
            new = out.create_node(node.op, node.target, args, {}, name=_name(node))
            new.meta = dict(node.meta)
            copies[node] = new
        return copies[node]

    for node in graph.nodes:
        if node.op == "placeholder":
            copy(node)
    for node in graph.nodes:
        if node.op == "call_function":
            copy(node)
        elif node.op == "output":
            out.output(copy(node.args[0]))
    return out, copies


def parameter_letters(node: fx.Node) -> str:
    """A parameter's dimensions, named after the values that it maps between."""
    rank = len(node.meta["shape"])
    user = next(iter(node.users))
    match user.target:
        case t if t in (linear, projection):
            into, out = user.args[0].meta["dims"], user.meta["dims"]  # type: ignore[union-attr]
            if not into or not out:
                return ""
            own = out[-1] if rank == 2 else out[-2:]
            return own + into[-1] if user.target is linear else into[-1] + own
        case t if t is embedding:
            return "VD"
        case t if t is positions:
            return "CD"
    result = user.meta["dims"]
    return result[-rank:] if result else ""
