"""The placements worth pricing on a tensor axis: the answers of the integer programs at a few
prices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

from llmspec.compiler.cost.hardware import Machine
from llmspec.compiler.cost.network import Group, group, inner_groups
from llmspec.compiler.cost.types import Types
from llmspec.compiler.cost.unit import Layout
from llmspec.compiler.graph import ModelGraph, Unit
from llmspec.compiler.kernels.kinds import EAGER
from llmspec.compiler.ops.registry import choice_named, entry_of, numel
from llmspec.compiler.passes.shard import whole_placement
from llmspec.compiler.placement import SHADOW, WHOLE, Split, State, local_shape, parse_state
from llmspec.compiler.plan import UnitPlacement
from llmspec.compiler.search.blocks import (
    Prices,
    Problem,
    memory_prices,
    objective_s,
    place,
    placement_of,
    time_prices,
)
from llmspec.compiler.views import WHOLE_VIEW, View

FAIR_SHARE = 1.2
"""How much more than its part of the parameters a tensor rank may hold, if that can be had."""
SPLIT_S_PER_BYTE = 1e-3
"""A price of parameters above every price of time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorOption:
    """One way to place every unit on `ranks` tensor ranks. `leaning`: which prices it answers.

    where: the tensor ranks. inner: the axes that operators send over by themselves.
    view: what the placed graph is a view of. kernels: what runs the operators.
    """

    ranks: int
    sequence: bool
    leaning: str
    where: Group
    inner: Mapping[str, Group]
    view: View
    placements: dict[str, UnitPlacement]
    kernels: str = EAGER

    def treats(self, unit: Unit) -> tuple[object, ...]:
        """All that this has to do with the price of a unit of its view's graph."""
        own = self.placements[unit.name]
        wires = () if silent(unit) else (self.inner["context"], self.inner["expert"])
        placed = (*own.nodes.items(), *own.parameters.items())
        sides = (own.boundary_in, own.boundary_out)
        return id(unit), self.ranks, self.kernels, sides, placed, wires


def tensor_options(
    graph: ModelGraph,
    ranks: int,
    sequences: list[bool],
    machine: Machine,
    types: Types,
    view: View = WHOLE_VIEW,
    solved: Solved | None = None,
) -> list[TensorOption]:
    """Distinct placements of the whole model: at prices that value time, and at ones that value
    memory.

    `graph`: of the smallest micro-batch; every part of the objective but launches and latencies
    grows in proportion with the micro-batch, so its placements serve larger ones, re-priced there.
    `solved`: answers for units that other views have too; more are added.
    """
    where = group(ranks, 1, machine)
    inner = inner_groups(ranks, view.context, view.expert, machine)
    if ranks == 1:
        whole = {name: whole_placement(unit) for name, unit in graph.units.items()}
        return [
            TensorOption(
                ranks=1,
                sequence=False,
                leaning="time",
                where=where,
                inner=inner,
                view=view,
                placements=whole,
            )
        ]
    found: list[TensorOption] = []
    for sequence in sequences:
        placed = _placed(graph, ranks, sequence, where, inner, machine, types, solved)
        for leaning, placements in placed.items():
            option = TensorOption(
                ranks=ranks,
                sequence=sequence,
                leaning=leaning,
                where=where,
                inner=inner,
                view=view,
                placements=placements,
            )
            found.append(option)
    return found


def seen_as(
    option: TensorOption, graph: ModelGraph, view: View, machine: Machine
) -> TensorOption | None:
    """The placements that were found for the whole model, for a view of it; None when the view has
    operators or sizes that they do not fit."""
    for name, unit in graph.units.items():
        chosen = option.placements[name].nodes
        for node in unit.calls():
            placed = chosen.get(node.name)
            if placed is None or not choice_named(placed, entry_of(node).rule(node), option.ranks):
                return None
    inner = inner_groups(option.ranks, view.context, view.expert, machine)
    return replace(option, view=view, inner=inner)


def _placed(
    graph: ModelGraph,
    ranks: int,
    sequence: bool,
    where: Group,
    inner: Mapping[str, Group],
    machine: Machine,
    types: Types,
    solved: Solved | None = None,
) -> dict[str, dict[str, UnitPlacement]]:
    """Distinct placements by what their prices lean to. Tensor ranks are there to split the model:
    where links are so slow that repeating the work would be faster, the price of a parameter is
    raised until they do."""
    prices = {"time": time_prices(machine, types), "memory": memory_prices(machine, types)}
    prices["split"] = replace(prices["memory"], parameter=SPLIT_S_PER_BYTE)
    found: dict[str, dict[str, UnitPlacement]] = {}
    shares: dict[str, float] = {}
    for leaning, price in prices.items():
        if leaning == "split" and min(shares.values(), default=1.0) <= FAIR_SHARE / ranks:
            break
        placements = place_model(
            graph, ranks, sequence, where, machine, types, price, inner, solved
        )
        if placements is not None and placements not in found.values():
            found[leaning] = placements
            shares[leaning] = parameter_share(graph, placements, ranks)
    bound = max(FAIR_SHARE / ranks, min(shares.values(), default=1.0))
    return {leaning: placed for leaning, placed in found.items() if shares[leaning] <= bound}


def parameter_share(graph: ModelGraph, placements: dict[str, UnitPlacement], ranks: int) -> float:
    """Of the model's parameters, how much one tensor rank holds."""
    local = whole = 0
    for instance in graph.instances:
        for path, parameter in graph.units[instance.unit].weights().items():
            state = parse_state(placements[instance.unit].parameters[path])
            local += numel(local_shape(parameter.held_shape, state, ranks))
            whole += numel(parameter.held_shape)
    return local / whole if whole else 0.0


def place_model(
    graph: ModelGraph,
    ranks: int,
    sequence: bool,
    where: Group,
    machine: Machine,
    types: Types,
    prices: Prices,
    inner: Mapping[str, Group] | None = None,
    solved: Solved | None = None,
) -> dict[str, UnitPlacement] | None:
    """Units one by one, except those that share a weight: they are tried in each of its states
    together. None when the tokens do not divide."""
    problems = {
        name: Problem(
            unit=unit,
            ranks=ranks,
            sequence=sequence,
            where=where,
            machine=machine,
            types=types,
            prices=prices,
            inner=inner or {},
        )
        for name, unit in graph.units.items()
    }
    layouts: dict[str, Layout] = {}
    for shared in _tied_units(graph):
        joint = _known_together(problems, shared, solved)
        if joint is None:
            return None
        layouts |= joint
    for name, problem in problems.items():
        if name not in layouts:
            layout = _known(problem, solved)
            if layout is None:
                return None
            layouts[name] = layout
    return {name: placement_of(layouts[name]) for name in graph.units}


Solved = dict[tuple[object, ...], tuple[tuple[Unit, ...], dict[str, Layout] | None]]
"""Answers by what they depend on besides the wires of units that send nothing by themselves; the
units are held on to, for their ids are in the keys."""


def silent(unit: Unit) -> bool:
    """Whether none of its operators sends by itself."""
    return not any(entry_of(node).sends for node in unit.calls())


def _key(problems: list[Problem]) -> tuple[object, ...]:
    one = problems[0]
    return (*(id(p.unit) for p in problems), one.ranks, one.sequence, one.where, one.prices)


def _known(problem: Problem, solved: Solved | None) -> Layout | None:
    """An answer of before, or a new one."""
    if solved is None or not silent(problem.unit):
        return place(problem)
    key, name = _key([problem]), problem.unit.name
    if key not in solved:
        layout = place(problem)
        solved[key] = (problem.unit,), None if layout is None else {name: layout}
    found = solved[key][1]
    return None if found is None else found[name]


def _known_together(
    problems: dict[str, Problem], tie: Tie, solved: Solved | None
) -> dict[str, Layout] | None:
    own = [problems[n] for n in sorted({unit for uses in tie.values() for unit, _ in uses})]
    if solved is None or not all(silent(p.unit) for p in own):
        return _place_together(problems, tie)
    key = _key(own)
    if key not in solved:
        solved[key] = tuple(p.unit for p in own), _place_together(problems, tie)
    return solved[key][1]


Tie = dict[str, list[tuple[str, str]]]
"""Full name of a weight -> (unit, path) of each that is it."""


def _tied_units(graph: ModelGraph) -> list[Tie]:
    """Groups of units connected by shared weights; disjoint."""
    owners = {
        instance.full_name(p.path): (instance.unit, p.path)
        for instance in graph.instances
        for p in graph.units[instance.unit].parameters.values()
        if p.tied is None
    }
    ties: Tie = {}
    for name, unit in graph.units.items():
        for p in unit.parameters.values():
            if p.tied is not None:
                uses = ties.setdefault(p.tied, [owners[p.tied]])
                uses.append((name, p.path))
    groups: list[Tie] = []
    for full, uses in ties.items():
        units = {u for u, _ in uses}
        touching = [g for g in groups if units & {u for us in g.values() for u, _ in us}]
        groups = [g for g in groups if g not in touching]
        merged: Tie = {full: uses}
        for other in touching:
            merged |= other
        groups.append(merged)
    return groups


def _place_together(problems: dict[str, Problem], tie: Tie) -> dict[str, Layout] | None:
    """The cheapest common states of shared weights, by trying each."""
    names = sorted({unit for uses in tie.values() for unit, _ in uses})
    options: list[list[State]] = []
    for uses in tie.values():
        unit, path = uses[0]
        dims = len(problems[unit].unit.parameters[path].shape)
        options.append([WHOLE, SHADOW, *(Split(d) for d in range(dims))])
    best: tuple[float, dict[str, Layout]] | None = None
    for states in product(*options):
        fixed: dict[str, dict[str, State]] = {name: {} for name in names}
        for uses, state in zip(tie.values(), states, strict=True):
            for unit, path in uses:
                fixed[unit][path] = state
        made = {n: _fixed_layout(problems[n], fixed[n]) for n in names}
        layouts = {n: layout for n, layout in made.items() if layout is not None}
        if len(layouts) < len(names):
            continue
        cost = sum(objective_s(problems[n], layout) for n, layout in layouts.items())
        if best is None or cost < best[0] * (1 - 1e-9):
            best = cost, layouts
    return None if best is None else best[1]


def _fixed_layout(problem: Problem, fixed: dict[str, State]) -> Layout | None:
    return place(replace(problem, fixed=fixed))
