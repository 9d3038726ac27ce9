"""`budget` and `prefer` in: what a plan must keep to, and which of those that do is the best."""

from __future__ import annotations

from collections.abc import Sequence

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import did_you_mean, fault, listing, shown
from llmspec.dsl.hardware import bytes_per_node, equal_only, in_bytes, settings_of
from llmspec.dsl.options import Kind
from llmspec.dsl.program import Budget, Cluster, Prefer, Train
from llmspec.dsl.units import Dimension, Measure, render_bytes
from llmspec.dsl.values import evaluate, in_units, real

BUDGET_KEYS = ("memory", "host_memory", "deadline", "cost")


def budget_of(sections: Sequence[syntax.Section], cluster: Cluster | None) -> Budget | None:
    """The first section's. None when the cluster has faults of its own. Errors: Fault."""
    if not sections:
        return Budget(memory_bytes=cluster.device.usable_bytes) if cluster else None
    section = sections[0]
    nodes = {
        key: equal_only(setting)
        for key, setting in settings_of(section.body, BUDGET_KEYS, "budget").items()
    }
    memory = cluster.device.usable_bytes if cluster else 0
    if "memory" in nodes:
        memory = memory_of(nodes["memory"], cluster)
    host_memory = None
    if "host_memory" in nodes:
        host_memory = bytes_per_node(nodes["host_memory"], "host_memory")
    return Budget(
        memory_bytes=memory,
        host_memory_bytes=host_memory,
        deadline_s=deadline(nodes["deadline"]) if "deadline" in nodes else None,
        cost=cost(nodes["cost"]) if "cost" in nodes else None,
        span=nodes["memory"].span if "memory" in nodes else section.span,
        key_spans={key: node.span for key, node in nodes.items()},
    )


def memory_of(node: syntax.Node, cluster: Cluster | None) -> int:
    memory, value = in_bytes(node, "memory"), evaluate(node)
    if not isinstance(value, Measure) or value.per not in ("gpu", "device"):
        raise fault(
            "E0302",
            "`memory` does not say per what",
            node.span,
            helps=("it is written like `72 GiB per gpu`",),
        )
    if cluster and memory > cluster.device.usable_bytes:
        usable = render_bytes(cluster.device.usable_bytes)
        raise fault(
            "E0409",
            f"the budget is more than `{cluster.device.name}` has",
            node.span,
            f"it can hand out {usable}",
        )
    return memory


def deadline(node: syntax.Node) -> float:
    seconds = in_units(evaluate(node), Dimension.SECONDS, node.span, "`deadline`").value
    if seconds <= 0:
        raise fault("E0303", "a `deadline` is more than no time", node.span)
    return float(seconds)


def cost(node: syntax.Node) -> float:
    return real(Kind.POSITIVE, evaluate(node), node.span, "`cost`")


def prefer_of(lines: Sequence[syntax.Prefer]) -> Prefer:
    """Errors: Fault."""
    if len(lines) > 1:
        raise fault(
            "E0217",
            "`prefer` is given twice",
            lines[1].span,
            "here again",
            secondary=((lines[0].span, "first here"),),
        )
    known = [p.value for p in Prefer]
    for line in lines:
        if line.words not in known:
            raise fault(
                "E0504",
                f"`prefer` cannot be `{shown(line.words)}`",
                line.span,
                f"expected {listing(known)}",
                helps=did_you_mean(line.words, known),
            )
        return Prefer(line.words)
    return Prefer.THROUGHPUT


def check_goals(
    prefer: Sequence[syntax.Prefer], budget: Budget, cluster: Cluster, train: Train
) -> None:
    """Whether the spec says what its goals are judged by. Errors: Fault."""
    said = {f"prefer {line.words}": line.span for line in prefer}
    spans = {**said, **budget.key_spans}
    for goal in ("prefer cost", "cost"):
        if goal in spans and cluster.device.price_per_hour is None:
            raise fault(
                "E0512",
                f"`{goal}` needs a price, and `{cluster.device.name}` has none",
                spans[goal],
                secondary=((cluster.span, "no `price` here"),),
                helps=(f"write `price = 2.50 per gpu hour` in cluster `{cluster.name}`",),
            )
    for goal in ("deadline", "cost"):
        if goal in spans and train.steps is None and train.tokens is None:
            raise fault(
                "E0512",
                f"`{goal}` needs to know how long the run is",
                spans[goal],
                secondary=((train.span, "no `steps` and no `tokens` here"),),
                helps=("write `steps = …` or `tokens = …` in the train block",),
            )
    goal = "prefer fewest gpus"
    if goal in spans and not cluster.nodes_are_bound:
        nodes = cluster.nodes
        raise fault(
            "E0512",
            f"`{goal}` needs a number of nodes that is left to the search",
            spans[goal],
            secondary=((cluster.nodes_span or cluster.span, "there is no choice here"),),
            helps=(f"write `nodes <= {nodes}` in cluster `{cluster.name}`",),
        )
