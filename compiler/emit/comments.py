"""What comments say of a statement: the data that it sends, over which axis, bytes, time; and what
its operator has to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from torch import fx

from llmspec.compiler.cost.unit import sent_by, sent_width
from llmspec.compiler.graph import without_gradient
from llmspec.compiler.ops.collective import Move, sends
from llmspec.compiler.ops.registry import Sends, entry_of, shapes_of
from llmspec.compiler.placement import Collective
from llmspec.compiler.plan import MeshSizes
from llmspec.compiler.precision import BYTES, Precision
from llmspec.compiler.text import in_bytes

VERBS = {
    Collective.ALL_REDUCE: "sum",
    Collective.ALL_GATHER: "gather",
    Collective.REDUCE_SCATTER: "sum and scatter",
    Collective.ALL_TO_ALL: "exchange",
    Collective.SEND: "pass",
    Collective.SLICE: "keep this rank's slice",
}

Times = Callable[[Move | Sends], float | None]
"""Predicted seconds of what is sent forward; None when they are not known."""


@dataclass(frozen=True, slots=True)
class Comments:
    mesh: MeshSizes
    precision: Precision
    times: Times

    def of_move(self, move: Move, node: fx.Node) -> tuple[str, ...]:
        if not sends(node) or without_gradient(node):
            return ()
        size = in_bytes(prod(move.whole_shape) * BYTES[self.precision.compute])
        forward, backward = move.conversion.forward, move.conversion.backward
        quiet = Collective.NONE
        time_s = self.times(move)
        cost = size if time_s is None else f"{size}, {time_s * 1e3:.3g} ms predicted"
        if forward is quiet:
            text = f"backward: {VERBS[backward]} over tensor, {cost}"
        else:
            text = f"{VERBS[forward]} over tensor: {cost}"
            if forward is Collective.SLICE:
                text = f"this rank's slice; backward: {VERBS[backward]} over tensor, {cost}"
            elif backward is not quiet:
                text += f"; backward: {VERBS[backward]}"
        return (text,)

    def of_sender(self, node: fx.Node) -> tuple[str, ...]:
        """Of an operator that sends by itself, or has something to be said of it."""
        lines: list[str] = []
        if node.op == "call_function" and (remark := entry_of(node).remark) is not None:
            lines += remark(node, shapes_of(node), BYTES[self.precision.compute])
        for one in sent_by(node, shapes_of(node)):
            ranks = getattr(self.mesh, one.axis)
            elements = one.elements_forward or one.elements_backward
            if one.kind is Collective.ALL_TO_ALL:
                elements //= ranks
            width = sent_width(one, BYTES[self.precision.compute])
            messages = one.count if one.kind is Collective.SEND and one.count > 1 else 0
            size = in_bytes((1 if messages else one.count) * elements * width)
            size = f"{messages} x {size}" if messages else size
            time_s = self.times(one)
            cost = size if time_s is None else f"{size}, {time_s * 1e3:.3g} ms predicted"
            verb = f"{VERBS[one.kind]} {one.what}".rstrip()
            what = f"{verb} over {one.axis}" + (" meanwhile" if one.hidden else "")
            text = f"{what}: {cost}"
            if not one.elements_forward:
                text = f"backward: {what}, {cost}"
            elif one.elements_backward:
                text += "; backward too" if one.what else f"; backward: {VERBS[one.kind]}"
            lines.append(text)
        return tuple(lines)
