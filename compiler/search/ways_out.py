"""What to change when nothing fits, cheapest first."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llmspec.compiler.search.candidates import Candidate
from llmspec.compiler.search.pins import Pins
from llmspec.compiler.search.space import Space
from llmspec.compiler.search.walk import best
from llmspec.dsl.program import Constraint

GiB = 2**30
MOST_NODES = 64
"""Times as many nodes as the spec has, at most, that are tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One change that makes a plan fit. key: the line of the spec that changes."""

    key: str
    text: str


def ways_out(space: Space, smallest: Candidate) -> tuple[Way, ...]:
    found = [way for pin in space.pins.constraints if (way := _without(space, pin))]
    if not found and space.pins.constraints and (way := _unpinned(space)):
        found.append(way)
    if not found and (way := _more_nodes(space)):
        found.append(way)
    needed = smallest.peak_bytes / GiB
    found.append(Way(key="memory", text=f"`memory = {needed:.1f} GiB per gpu` fits this plan"))
    return tuple(found)


def least_bytes(space: Space) -> tuple[int, float] | None:
    """(peak, seconds) of the fastest plan that fits, or None."""
    found = best(space.by_nodes(), space.objective)
    return None if found is None else (found.peak_bytes, found.step_s)


def _with_pins(space: Space, pins: tuple[Constraint, ...]) -> Space:
    return space.pinned(Pins(pins))


def _without(space: Space, pin: Constraint) -> Way | None:
    rest = tuple(c for c in space.pins.constraints if c is not pin)
    found = least_bytes(_with_pins(space, rest))
    if found is None:
        return None
    value = ", ".join(str(v) for v in pin.values)
    text = (
        f"without `{pin.key} {pin.relation} {value}` the fastest plan needs "
        f"{found[0] / GiB:.1f} GiB and {found[1]:.3g} s a step, predicted"
    )
    return Way(key=pin.key, text=text)


def _unpinned(space: Space) -> Way | None:
    found = least_bytes(_with_pins(space, ()))
    if found is None:
        return None
    return Way(key="plan", text=f"without the `plan` block {found[0] / GiB:.1f} GiB are enough")


def _more_nodes(space: Space) -> Way | None:
    program, factor = space.program, 2
    while factor <= MOST_NODES:
        nodes = program.cluster.nodes * factor
        wider = replace(program, cluster=replace(program.cluster, nodes=nodes))
        bigger = replace(space, program=wider)
        found = least_bytes(bigger)
        if found is not None:
            return Way(
                key="nodes", text=f"`nodes = {nodes}` is enough: {found[0] / GiB:.1f} GiB per gpu"
            )
        factor *= 2
    return None
