"""Split experts over expert ranks: the graph of one of them.

before: a graph in which every rank holds all experts
after:  a graph with one rank's experts, rows sent to where their expert is and back
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd
from typing import Any

from torch import fx

from llmspec.compiler.errors import InternalError
from llmspec.compiler.graph import ModelGraph, Parameter, Unit
from llmspec.compiler.ops.exchange import (
    exchange_counts,
    own_counts,
    return_to_tokens,
    send_to_experts,
)
from llmspec.compiler.ops.experts import combine, dispatch, grouped_bias, grouped_linear

GROUPED = (grouped_linear, grouped_bias)
"""Operators of (rows, a stack of experts' weights, the rows of each expert)."""


def expert_divisor(graph: ModelGraph) -> int:
    """What the number of expert ranks must divide; 1 for a model without experts."""
    counts = [p.shape[0] for unit in graph.units.values() for p in _stacks(unit)]
    return gcd(*counts) if counts else 1


def split_experts(graph: ModelGraph, ranks: int) -> ModelGraph:
    """Errors: InternalError when the experts do not divide."""
    if expert_divisor(graph) % ranks:
        raise InternalError(f"{ranks} expert ranks cannot share the experts of {graph.name}")
    units = {
        name: _Splitter(unit, ranks).run() if any(_stacks(unit)) else unit
        for name, unit in graph.units.items()
    }
    return graph.with_units(units)


def _stacks(unit: Unit) -> list[Parameter]:
    """The weights that have one slice for each expert."""
    return [p for p in unit.parameters.values() if p.picks is not None]


class _Splitter:
    """Copies one unit's graph.

    exchanges: of the rows that each of the counts speaks of. values: the new graph's nodes.
    """

    def __init__(self, unit: Unit, ranks: int):
        self.unit, self.ranks = unit, ranks
        self.graph = fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.exchanges: dict[fx.Node, fx.Node] = {}
        self.counts: dict[fx.Node, fx.Node] = {}
        self.parameters = {
            path: replace(p, expert_ranks=ranks) if p.picks is not None else p
            for path, p in unit.parameters.items()
        }

    def run(self) -> Unit:
        for node in self.unit.graph.nodes:
            if node.op == "output":
                self.graph.output(self.values[self.unit.result()])
                continue
            sent = node.op == "call_function" and node.target is combine
            if sent:
                self._return(node)
            self.values[node] = self._copy(node)
            if node.op == "call_function" and node.target is dispatch:
                self._send(node)
        return Unit(
            name=self.unit.name,
            graph=self.graph,
            inputs=self.unit.inputs,
            span=self.unit.span,
            parameters=self.parameters,
        )

    def _copy(self, node: fx.Node) -> fx.Node:
        copied = self.graph.node_copy(node, lambda n: self.values[n])
        copied.meta = dict(node.meta)
        if node.op == "get_attr":
            weight = self.parameters[node.meta["parameter"].path]
            copied.meta |= {"parameter": weight, "shape": weight.held_shape}
        if node.op == "call_function" and node.target in GROUPED:
            copied.args = (*copied.args[:2], self.counts[self._counts_of(node)])
        return copied

    def _counts_of(self, node: fx.Node) -> fx.Node:
        counts = node.args[2]
        assert isinstance(counts, fx.Node), "an expert's rows are counted"
        return counts

    def _send(self, dispatched: fx.Node) -> None:
        """Right after the rows are made: what belongs to whom, and the rows themselves."""
        counts = self._counts_of(_first_product(dispatched))
        experts = counts.meta["shape"][0]
        like = {**counts.meta, "scope": dispatched.meta["scope"]}
        exchange = self._call(
            exchange_counts,
            (self.values[counts], self.ranks),
            f"{counts.name}_exchange",
            like | {"label": "exchange", "dims": "", "shape": (self.ranks, experts // self.ranks)},
        )
        self.exchanges[counts] = exchange
        self.counts[counts] = self._call(
            own_counts,
            (exchange,),
            f"{counts.name}_own",
            like | {"label": "counts", "dims": "x", "shape": (experts // self.ranks,)},
        )
        self.values[dispatched] = self._call(
            send_to_experts,
            (self.values[dispatched], exchange),
            f"{dispatched.name}_sent",
            dict(dispatched.meta),
        )

    def _return(self, combined: fx.Node) -> None:
        rows = combined.args[0]
        assert isinstance(rows, fx.Node), "rows are combined"
        exchange = self.exchanges[self._counts_of(_last_product(rows))]
        self.values[rows] = self._call(
            return_to_tokens,
            (self.values[rows], exchange),
            f"{rows.name}_returned",
            {**rows.meta, "scope": combined.meta["scope"]},
        )

    def _call(self, function: Any, args: tuple[Any, ...], name: str, meta: dict) -> fx.Node:
        node = self.graph.create_node("call_function", function, args, name=name)
        node.meta = meta
        return node


def _first_product(node: fx.Node) -> fx.Node:
    """The first product of experts downstream of `node`."""
    waiting = list(node.users)
    while waiting:
        user = waiting.pop(0)
        if user.target in GROUPED:
            return user
        waiting += user.users
    raise InternalError(f"{node.name} is dispatched to no expert")


def _last_product(node: fx.Node) -> fx.Node:
    """The last product of experts upstream of `node`."""
    waiting = [node]
    while waiting:
        value = waiting.pop(0)
        if value.target in GROUPED:
            return value
        waiting += value.all_input_nodes
    raise InternalError(f"{node.name} comes from no expert")
