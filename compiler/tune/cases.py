"""From a lowered program's kernels to what the worker measures: shapes, tiles, eager statements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from llmspec.compiler.graph import without_gradient
from llmspec.compiler.kernels.direction import Direction, backward_of, forward_of
from llmspec.compiler.kernels.group import Group
from llmspec.compiler.kernels.kernel import groups_in
from llmspec.compiler.kernels.measured import structure_of
from llmspec.compiler.kernels.naming import kernel_name
from llmspec.compiler.kernels.tiles import alive, reduces_rows
from llmspec.compiler.lower import Lowered
from llmspec.compiler.ops.formula import Expr
from llmspec.compiler.ops.registry import (
    Localised,
    Shape,
    entry_of,
    numel,
    shape_of,
    tensor_operands,
)
from llmspec.compiler.passes.fuse import in_product
from llmspec.compiler.tune.candidates import STAGES, Tile, tiles

Case = dict[str, Any]
DRAWN = {"stream": 1234567, "threshold": -(1 << 62), "raised": 4 / 3}
"""A mask that keeps three of four."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """One kernel at one width: the group of the most rows that it computes."""

    group: Group
    name: str
    structure: str


def tuned_groups(lowered: Lowered) -> list[Tuned]:
    found: dict[tuple[str, int], Tuned] = {}
    for unit in lowered.units.values():
        for group in groups_in(unit):
            key = group.name, group.columns
            if key not in found or found[key].group.rows < group.rows:
                found[key] = Tuned(group, kernel_name(group), structure_of(group))
    return list(found.values())


def case_of(group: Group, dtype: str, most_tiles: int) -> Case:
    """`dtype`: PyTorch's name of the compute type. most_tiles: that are measured of a direction."""
    forward, backward = forward_of(group), backward_of(group)
    return {
        "forward": direction(forward, dtype, most_tiles),
        "backward": direction(backward, dtype, most_tiles) if backward is not None else None,
        "eager": eager(group, dtype),
    }


def moved_bytes(group: Group, width: int) -> tuple[int, int]:
    return group.forward_bytes(width), group.backward_bytes(width)


# --------------------------------------------------------------------------------------------------
# The kernel


def direction(one: Direction, dtype: str, most_tiles: int) -> Case:
    group = one.group
    rows_reduced = reduces_rows(one.roots)
    found = tiles(group.columns, whole_rows=rows_reduced, alive=alive(one.roots))
    loops = any(e.op == "column_sum" for e in one.roots)
    return {
        "name": one.name,
        "rule": "whole_rows" if rows_reduced else "flat",
        "columns": group.columns,
        "arguments": [_argument(one, e, dtype) for _, e in one.reads],
        "scalars": [DRAWN[n] for n in one.scalars],
        "tiles": evenly(found, most_tiles),
        "stages": list(STAGES) if loops else [],
    }


def evenly(found: list[Tile], most: int) -> list[Tile]:
    """At most so many, spread over all of them."""
    count = min(len(found), most)
    return [found[i * len(found) // count] for i in range(count)]


def _argument(one: Direction, e: Expr, dtype: str) -> Case:
    """times: of whole numbers, which count up. raised: of a row's statistics, far from 0."""
    found, group = one.input_of(e), one.group
    table = found is not None and found.extra is not None
    if one.integer(e):
        (count,) = shape_read(one, e)
        return {"shape": [count], "times": group.columns if e.label == "places" else 1}
    kind = "float32" if table or not e.columns else dtype
    raised = 0.0 if e.columns else 2.0
    return {"shape": list(shape_read(one, e)), "dtype": kind, "raised": raised}


def shape_read(one: Direction, e: Expr) -> Shape:
    found, whole = one.input_of(e), one.group.whole
    if found is not None and found.node is not None:
        return shape_of(found.node)
    if found is not None and found.extra is not None:
        first, stop = found.extra.per
        if found.integer:
            return (numel(whole[first:stop]),)
        return (*whole[first:stop], *[1] * (len(whole) - 1 - stop), whole[-1])
    return (*whole[:-1], whole[-1] if e.columns else 1)


# --------------------------------------------------------------------------------------------------
# PyTorch's own operators


def eager(group: Group, dtype: str) -> Case:
    """The group's operators as a program without kernels has them. A bias that a product adds costs
    nothing forward: `forward` leaves it out."""
    inside = set(group.members)
    reads = dict.fromkeys(o for n in group.members for o in tensor_operands(n) if o not in inside)
    imports: set[tuple[str, str]] = set()
    statements, forward = [], []
    for node in group.members:
        local = node.meta.get("localised", Localised())
        given = [a.name if isinstance(a, fx.Node) else repr(a) for a in node.args]
        printed = entry_of(node).render(node, given, local)
        imports |= {one for one in printed.imports if one[0]}
        statements.append((node.name, printed.text))
        free = in_product(node)
        forward.append((node.name, tensor_operands(node)[0].name if free else printed.text))
    return {
        "inputs": [_input(node, dtype) for node in reads],
        "imports": sorted(imports),
        "statements": statements,
        "forward": forward,
        "results": [o.node.name for o in group.outputs],
    }


def _input(node: fx.Node, dtype: str) -> Case:
    shape = list(shape_of(node))
    if without_gradient(node):
        return {"name": node.name, "shape": shape, "times": 1}
    return {"name": node.name, "shape": shape, "dtype": dtype, "raised": 0.0}
