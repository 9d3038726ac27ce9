"""What to change in the spec when no plan does all that it asks, each change with its price."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from llmspec.compiler.search.candidates import Candidate
from llmspec.compiler.search.explain import duration, seconds
from llmspec.compiler.search.limits import steps_of
from llmspec.compiler.search.objective import Objective
from llmspec.compiler.search.pins import Pins
from llmspec.compiler.search.space import Space
from llmspec.compiler.search.walk import best
from llmspec.dsl.program import Budget, Call, Constraint, Option, Prefer, Span

GiB = 2**30
MORE_NODES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Times as many nodes as the spec has that are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One change after which a plan does what the spec asks.

    key: what of the spec changes; change: how, as it would be written; span: the line, where there
    is one. The rest is of the best plan then.
    """

    key: str
    change: str
    span: Span | None
    ranks: int
    peak_bytes: int
    step_s: float
    run_s: float | None

    @property
    def text(self) -> str:
        price = (
            f"{self.peak_bytes / GiB:.1f} GiB per gpu and {seconds(self.step_s)} a step "
            f"on {self.ranks} GPUs"
        )
        if self.run_s is not None:
            price += f", {duration(self.run_s)} for the run"
        return f"{self.change}: {price}, predicted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A spec with one line changed, as the spaces of its plans."""

    key: str
    change: str
    span: Span | None
    spaces: tuple[Space, ...]
    objective: Objective

    def priced(self) -> Way | None:
        """None where no plan does all that is asked even so."""
        found = best(self.spaces, self.objective)
        if found is None:
            return None
        return _way(self.key, self.change, self.span, self.spaces[0], found)


def _way(key: str, change: str, span: Span | None, space: Space, found: Candidate) -> Way:
    """`found`: the best plan of the space once the change is made."""
    played = space.played(found)
    known = steps_of(space.program.train) is not None and space.limits.any
    return Way(
        key=key,
        change=change,
        span=span,
        ranks=found.ranks,
        peak_bytes=found.peak_bytes,
        step_s=played.step_s,
        run_s=space.run_s(played) if known else None,
    )


def ways_out(space: Space, smallest: Candidate) -> tuple[Way, ...]:
    """Where no plan fits the memory: other pins, or more memory; else other numbers and more nodes.
    Those that take no more devices first, and of these the fastest."""
    found = _other_pins(space)
    if not found:
        found = _fewer_bytes(space.home(smallest)) + _more_nodes(space)
    found += _priced(_more_memory(space, smallest))
    return tuple(sorted(found, key=lambda way: (way.ranks, way.step_s)))


def ways_in_time(space: Space, nearest: Candidate, goal: str) -> tuple[Way, ...]:
    """Where no plan that fits keeps to the deadline or the cost. `nearest`: the one that misses
    the goal by least."""
    found = _other_pins(space)
    if goal == "deadline":
        found += _more_nodes(space)
    return (*found, _relaxed(space, nearest, goal), *_shorter(space, nearest))


def _priced(changes: Iterable[Change]) -> list[Way]:
    return [way for change in changes if (way := change.priced())]


# --------------------------------------------------------------------------------------------------
# Lines of the plan block


def _other_pins(space: Space) -> list[Way]:
    """Without each line; without all of them where none alone is enough."""
    lines = space.pins.constraints
    alone = [
        _pinned(space, [c for c in lines if c is not line], line.key, _without(line), line.span)
        for line in lines
    ]
    all_ = [_pinned(space, [], "plan", "without the `plan` block", line.span) for line in lines[:1]]
    return _priced(alone) or _priced(all_)


def _without(line: Constraint) -> str:
    values = ", ".join(_word(v) for v in line.values)
    return (
        f"without `{line.key} {line.relation} {f'[{values}]' if line.relation == 'in' else values}`"
    )


def _pinned(space: Space, pins: list[Constraint], key: str, change: str, span: Span) -> Change:
    return Change(
        key=key,
        change=change,
        span=span,
        spaces=space.pinned(Pins(tuple(pins))).apart(),
        objective=space.objective,
    )


def _word(value: Option) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


# --------------------------------------------------------------------------------------------------
# Memory


def _more_memory(space: Space, smallest: Candidate) -> Iterator[Change]:
    """What the smallest plan needs, and all that the device has."""
    tenth = GiB // 10
    needed = math.ceil(smallest.peak_bytes / tenth) * tenth
    usable, budget = space.program.cluster.device.usable_bytes, space.program.budget
    for size in sorted({needed, usable}):
        if needed <= size <= usable:
            yield Change(
                key="memory",
                change=f"`memory = {size / GiB:.1f} GiB per gpu`",
                span=budget.key_spans.get("memory", budget.span),
                spaces=space.changed(budget=replace(budget, memory_bytes=size)).apart(),
                objective=space.objective,
            )


def _fewer_bytes(space: Space) -> list[Way]:
    """Numbers that take fewer bytes a parameter, the first of them that is enough."""
    train = space.program.train
    for call in _shorter_numbers(space):
        changed = replace(space.program, train=replace(train, precision=call))
        other = Space.of(changed, space.chain.build)
        change = Change(
            key="precision",
            change=f"`precision = {_call(call)}`",
            span=train.key_spans.get("precision", train.span),
            spaces=other.apart(),
            objective=space.objective,
        )
        if (way := change.priced()) is not None:
            return [way]
    return []


def _shorter_numbers(space: Space) -> Iterator[Call]:
    """Of the spec's own precision, with parts that it leaves at float32."""
    train = space.program.train
    parts = dict(train.precision.options)
    moments = {"moments": "bf16"} if space.types.moments else {}
    if train.precision.name == "fp32" and "bf16" in space.program.cluster.device.peak_flops:
        yield Call(name="bf16", options=(), span=train.span)
    if parts.get("moments") == "fp32" and moments:
        yield replace(train.precision, options=tuple({**parts, **moments}.items()))
    if train.precision.name == "bf16" and parts.get("master") is not None:
        short = {**parts, **moments, "master": None, "rounding": "stochastic"}
        yield replace(train.precision, options=tuple(short.items()))


def _call(call: Call) -> str:
    """Without what is said anyway."""
    said = {"fp32", "nearest", "dynamic", "off"}
    parts = [f"{k}={'none' if v is None else v}" for k, v in call.options if v not in said]
    return f"{call.name}({', '.join(parts)})" if parts else call.name


# --------------------------------------------------------------------------------------------------
# Nodes and time


def _more_nodes(space: Space) -> list[Way]:
    """The fewest that are enough."""
    cluster = space.program.cluster
    tried = (cluster.of(cluster.nodes * times) for times in MORE_NODES)
    spaces = tuple(one for more in tried for one in space.changed(cluster=more).apart())
    fewest = Objective(Prefer.FEWEST_GPUS)
    found = best(spaces, fewest)
    if found is None:
        return []
    nodes = found.ranks // cluster.devices_per_node
    relation = "<=" if cluster.nodes_are_bound else "="
    change = Change(
        key="nodes",
        change=f"`nodes {relation} {nodes}`",
        span=cluster.nodes_span or cluster.span,
        spaces=space.changed(cluster=cluster.of(nodes)).apart(),
        objective=space.objective,
    )
    return _priced([change])


def _relaxed(space: Space, nearest: Candidate, goal: str) -> Way:
    """The goal that the nearest plan meets."""
    budget = space.program.budget
    if goal == "deadline":
        change = f"`deadline = {math.ceil(space.run_s(nearest) / 8640) / 10:g} days`"
    else:
        change = f"`cost = {math.ceil(cost_of(space, nearest)):_}`"
    return _way(goal, change, budget.key_spans.get(goal), space, nearest)


def _shorter(space: Space, nearest: Candidate) -> Iterator[Way]:
    """The steps that the nearest plan can do, where the batch does not grow."""
    train = space.program.train
    steps = int(space.limits.run_s(nearest.ranks) / nearest.step_s)
    if steps and not train.ramp_stages:
        key = "tokens" if "tokens" in train.key_spans else "steps"
        size = f"{steps * train.batch_tokens:_} tokens" if key == "tokens" else f"{steps:_}"
        span = train.key_spans.get(key, train.span)
        way = _way(key, f"`{key} = {size}`", span, space, nearest)
        yield replace(way, run_s=steps * nearest.step_s)


def cost_of(space: Space, found: Candidate) -> float:
    """Of the whole run of a plan that has been played."""
    price = space.program.cluster.device.price_per_hour
    assert price is not None, "a cost needs a price"
    return space.run_s(found) / 3600 * found.ranks * price


def without_goals(budget: Budget, *goals: str) -> Budget:
    """The same memory without a deadline, a cost."""
    nothing = {"deadline_s" if goal == "deadline" else goal: None for goal in goals}
    return replace(budget, **nothing)  # type: ignore[arg-type]
