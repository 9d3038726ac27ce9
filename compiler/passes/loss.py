"""Join the last product and the loss: the logits are made, used and dropped some rows at a time.

before: logits = linear(x, weight);  loss = cross_entropy(logits, targets)
after:  loss = linear_cross_entropy(x, weight, targets, rows)
"""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from llmspec.compiler.graph import ModelGraph, Unit
from llmspec.compiler.ops.linear import linear
from llmspec.compiler.ops.linear_loss import linear_cross_entropy
from llmspec.compiler.ops.loss import cross_entropy
from llmspec.compiler.ops.registry import shape_of


def joined_weight(graph: ModelGraph) -> fx.Node | None:
    """The weight of the product whose result is nothing but the loss's logits; None where
    something stands between the two, or another reads them."""
    loss = graph.units[graph.instances[-1].unit].result()
    if loss.op != "call_function" or loss.target is not cross_entropy:
        return None
    product = loss.args[0]
    assert isinstance(product, fx.Node), "a loss is of logits"
    if product.op != "call_function" or product.target is not linear or len(product.users) > 1:
        return None
    weight = product.args[1]
    assert isinstance(weight, fx.Node), "a product is with a weight"
    return weight if len(shape_of(weight)) == 2 else None


def join_loss(graph: ModelGraph, rows: int) -> ModelGraph:
    """The graph with the two as one, which has the logits of so many rows at a time."""
    assert joined_weight(graph) is not None, "there is a product to join the loss with"
    name = graph.instances[-1].unit
    return replace(graph, units=graph.units | {name: _joined(graph.units[name], rows)})


def _joined(unit: Unit, rows: int) -> Unit:
    loss = unit.result()
    product, targets = loss.args
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in unit.graph.nodes:
        if node is product:
            continue
        if node is loss:
            operands = (*product.args, targets)  # type: ignore[union-attr]
            args: tuple[fx.node.Argument, ...] = (*(new[a] for a in operands), rows)  # type: ignore[index]
            new[node] = graph.create_node(
                "call_function", linear_cross_entropy, args, name=node.name
            )
        elif node.op == "output":
            graph.output(new[loss])
            continue
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
        new[node].meta = dict(node.meta)
    return replace(unit, graph=graph)
