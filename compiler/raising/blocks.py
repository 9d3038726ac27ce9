"""Where a traced model falls into a chain: what is first, its repeated blocks, what is last."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from llmspec.compiler.graph import Init
from llmspec.compiler.raising.trace import Trace, shape_of, value_of


@dataclass(frozen=True, slots=True)
class Segment:
    """One link of the chain, from one value to the next. path: the block's module; "": no block."""

    path: str
    start: fx.Node
    stop: fx.Node


@dataclass(frozen=True, slots=True)
class _Block:
    path: str
    start: fx.Node
    stop: fx.Node


def _paths(node: fx.Node) -> list[str]:
    stack = node.meta.get("nn_module_stack") or {}
    found = (path.split("@")[0] for path, _ in stack.values())
    return [p.removeprefix("model").removeprefix(".") for p in found]


def _containers(module: nn.Module) -> list[str]:
    """Paths of lists of alike, compound modules, outermost ones."""
    found: list[str] = []
    for path, part in module.named_modules():
        if not isinstance(part, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            continue
        inside = any(path.startswith(f"{outer}.") for outer in found)
        children = list(part.children())
        compound = all(any(True for _ in c.children()) for c in children)
        if children and compound and not inside:
            found.append(path)
    return found


def _live(trace: Trace) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [trace.output]
    while stack:
        node = stack.pop()
        if node not in seen and not trace.is_constant(node):
            seen.add(node)
            stack += node.all_input_nodes
    return seen


def _outer(nodes: Iterable[fx.Node], trace: Trace) -> list[fx.Node]:
    return [n for n in dict.fromkeys(nodes) if n not in trace.parameters]


def _blocks_of(trace: Trace, container: str, live: set[fx.Node]) -> list[_Block] | None:
    """The container's blocks in the order they run in; None when more than one value flows."""
    members: dict[str, list[fx.Node]] = {}
    for node in trace.graph.nodes:
        if node not in live or node.op != "call_function":
            continue
        for path in _paths(node):
            if path.startswith(f"{container}.") and "." not in path[len(container) + 1 :]:
                members.setdefault(path, []).append(node)
                break
    blocks = []
    for path, nodes in members.items():
        own = set(nodes)
        into = _outer(
            (i for n in nodes for i in n.all_input_nodes if i in live and i not in own), trace
        )
        out = [n for n in nodes if any(u in live and u not in own for u in n.users)]
        out += [n for n in nodes if n is trace.output]
        if len(into) != 1 or len(out) != 1:
            return None
        blocks.append(_Block(path, into[0], out[0]))
    return blocks


def _reaches_ids(trace: Trace, segment: Segment) -> bool:
    """Whether a segment needs more than the value that it starts from."""
    seen: set[fx.Node] = set()
    stack = [segment.stop]
    while stack:
        node = stack.pop()
        if node in seen or node is segment.start:
            continue
        seen.add(node)
        if node is trace.ids:
            return True
        stack += [n for n in node.all_input_nodes if not trace.is_constant(n)]
    return False


def _chain(trace: Trace, blocks: list[_Block]) -> list[Segment]:
    order = {n: i for i, n in enumerate(trace.graph.nodes)}
    segments: list[Segment] = []
    here = trace.ids
    for block in sorted(blocks, key=lambda b: order[b.stop]):
        if block.start is not here:
            segments.append(Segment("", here, block.start))
        segments.append(Segment(block.path, block.start, block.stop))
        here = block.stop
    segments.append(Segment("", here, trace.output))
    return segments


def find_chain(trace: Trace) -> list[Segment]:
    """From the ids to the logits. Without blocks: one segment from end to end."""
    live = _live(trace)
    blocks: list[_Block] = []
    for container in _containers(trace.module):
        found = _blocks_of(trace, container, live)
        if not found:
            continue
        tried = _chain(trace, blocks + found)
        flows = all(_is_flow(trace, s) for s in tried)
        if flows and not any(s.start is not trace.ids and _reaches_ids(trace, s) for s in tried):
            blocks += found
    return _chain(trace, blocks)


def _is_flow(trace: Trace, segment: Segment) -> bool:
    """Whether what a segment starts from is [sequences, tokens, width], or the ids."""
    if segment.start is trace.ids:
        return True
    lead = shape_of(trace.ids)
    value = value_of(segment.start)
    return value.dim() == 3 and tuple(value.shape[:2]) == lead and value.dtype.is_floating_point


# --------------------------------------------------------------------------------------------------
# Equal blocks


def fingerprint(
    trace: Trace, segment: Segment, inits: dict[str, Init], owners: frozenset[str]
) -> tuple[Any, ...]:
    """Equal for blocks that compute and start alike, the names of their own weights apart."""
    numbers: dict[fx.Node, int] = {segment.start: 0}
    lines: list[Any] = []
    prefix = f"{segment.path}."

    def leaf(node: fx.Node) -> Any:
        if node in trace.parameters:
            name = trace.parameters[node]
            own = name.startswith(prefix)
            short = name.removeprefix(prefix) if own else name
            return ("parameter", own, short, shape_of(node), inits[name], name in owners)
        if node in trace.buffers:
            return ("buffer", trace.recording.signature(trace.buffers[node][1]))
        if node in trace.data:
            return (
                "data",
                tuple(trace.data[node].shape),
                tuple(trace.data[node].flatten().tolist()),
            )
        if trace.is_constant(node) and not any(p == segment.path for p in _paths(node)):
            return ("constant", node.name)
        return None

    def visit(node: fx.Node) -> None:
        stack = [node]
        while stack:
            top = stack[-1]
            if top in numbers:
                stack.pop()
                continue
            known = leaf(top)
            waiting = [] if known else [n for n in top.all_input_nodes if n not in numbers]
            if waiting:
                stack += reversed(waiting)
                continue
            stack.pop()
            numbers[top] = len(numbers)
            lines.append(known or _line(top, numbers))

    visit(segment.stop)
    return tuple(map(repr, lines))


def _line(node: fx.Node, numbers: dict[fx.Node, int]) -> Any:
    args, options = fx.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{numbers[n]}")
    value = value_of(node)
    shape = tuple(value.shape) if hasattr(value, "shape") else ()
    return (str(node.target), args, options, shape, str(getattr(value, "dtype", "")))
