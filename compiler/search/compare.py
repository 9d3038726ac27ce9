"""What the chosen placement of a block saves against the next best families of placements."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import fx

from llmspec.compiler.cost.compute import is_integer
from llmspec.compiler.cost.unit import Layout, resolve, unit_cost
from llmspec.compiler.graph import Unit
from llmspec.compiler.ops.registry import entry_of, tensor_operands
from llmspec.compiler.passes.shard import whole_placement
from llmspec.compiler.placement import Kind
from llmspec.compiler.search.blocks import Problem, place


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One way to place a block: seconds of its forward and backward on one micro-batch, bytes that
    autograd keeps of it, bytes of its weights, gradients and moments."""

    name: str
    layout: Layout
    step_s: float
    kept_bytes: int
    parameter_bytes: int


def families(problem: Problem) -> tuple[Family, ...]:
    """The best placement with the sequence split between operators, the best without, and nothing
    split; fastest first. Those that cannot be are left out."""
    found = []
    for name, sequence in (("sequence on", True), ("sequence off", False)):
        layout = place(replace(problem, sequence=sequence))
        if layout is not None:
            found.append(_family(problem, name, layout))
    whole = resolve(problem.unit, whole_placement(problem.unit), problem.ranks)
    found.append(_family(problem, "everything whole", whole))
    return tuple(sorted(found, key=lambda f: f.step_s))


def _family(problem: Problem, name: str, layout: Layout) -> Family:
    types = problem.types
    cost = unit_cost(
        problem.unit, layout, problem.where, problem.machine, types.compute, problem.inner
    )
    passes = cost.whole_forward_s + cost.whole_backward_s
    return Family(
        name=name,
        layout=layout,
        step_s=passes,
        kept_bytes=cost.saved_bytes,
        parameter_bytes=types.bytes_per_parameter * cost.elements,
    )


def savings(found: tuple[Family, ...]) -> list[str]:
    """One line a family after the best: what it costs more."""
    best = found[0]
    lines = []
    for other in found[1:]:
        slower = 100 * (other.step_s / best.step_s - 1)
        kept = (other.kept_bytes - best.kept_bytes) / 2**20
        stored = (other.parameter_bytes - best.parameter_bytes) / 2**20
        lines.append(
            f"{other.name}: {slower:+.1f} % time, {kept:+,.0f} MiB kept for the backward, "
            f"{stored:+,.0f} MiB of weights, gradients and moments"
        )
    return lines


@dataclass(frozen=True, slots=True)
class Reading:
    """Weights that are split by what they give (column), by what they take (row), or not at all."""

    column: tuple[str, ...]
    row: tuple[str, ...]
    whole: tuple[str, ...]

    def __str__(self) -> str:
        parts = []
        for names, words in ((self.column, "by output"), (self.row, "by input")):
            if names:
                parts.append(f"{', '.join(names)} {words}")
        if self.whole:
            parts.append(f"{', '.join(self.whole)} whole")
        return "; ".join(parts)


def reading(unit: Unit, layout: Layout) -> Reading:
    """Weights of products that sum over their split dimension are split by input."""
    groups: dict[str, list[str]] = {"column": [], "row": [], "whole": []}
    for node in unit.calls():
        for operand in tensor_operands(node):
            if operand.op == "get_attr" and not is_integer(operand):
                groups[_group(layout, node, operand)].append(str(operand.target))
    return Reading(*(tuple(dict.fromkeys(groups[k])) for k in ("column", "row", "whole")))


def _group(layout: Layout, node: fx.Node, weight: fx.Node) -> str:
    if layout.parameters[str(weight.target)].kind is not Kind.SPLIT:
        return "whole"
    summed = layout.choices[node].result.kind is Kind.PARTIAL
    return "row" if summed and not entry_of(node).looks_up else "column"


def placement_text(problem: Problem, chosen: Layout) -> list[str]:
    """The block's chosen placement in words, and what it saves against each family's best."""
    name = f"sequence {'on' if problem.sequence else 'off'}"
    best = _family(problem, name, chosen)
    others = [f for f in families(problem) if f.name != name]
    head = f"{problem.unit.name} on {problem.ranks} tensor ranks, {name}: "
    return [head + str(reading(problem.unit, chosen)), *savings((best, *others))]
