"""Families: all plans with one value of one key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from llmspec.compiler.cost.offload import Offload
from llmspec.compiler.schedules import Schedule
from llmspec.compiler.search.candidates import (
    Candidate,
    Family,
    Floored,
    Outline,
    Shape,
    Sharing,
    Sketch,
    Turn,
    Way,
)
from llmspec.compiler.search.meshes import Grid
from llmspec.compiler.search.space import Space
from llmspec.compiler.views import View

Point = Sketch | Outline | Sharing | Turn | Way | Floored
"""Of the space of plans, from a mesh to one plan."""

MESH = ("tensor", "pipeline", "context", "expert", "microbatch")
"""Keys that decide a mesh; data ranks are what is left."""


def families_of(found: Candidate) -> tuple[Family, ...]:
    way = Way(
        shape=found.shape,
        zero=found.zero,
        shards=found.shards,
        schedule=found.schedule,
        offload=found.offload,
    )
    return (*families_at(way), *found.choices)


def families_at(way: Way) -> tuple[Family, ...]:
    shape, grid = way.shape, way.shape.grid
    return (
        *shape_families(shape),
        *sharing_families(grid, way.zero, way.shards),
        *schedule_families(grid, way.schedule, len(shape.cut) // grid.pipeline),
        *offload_families(way.offload),
    )


def shape_families(shape: Shape | Outline) -> tuple[Family, ...]:
    """The families that an outline has decided."""
    option = shape.option
    names = [("recompute", str(shape.recompute)), ("kernels", option.kernels)]
    if shape.grid.tensor > 1:
        names.append(("sequence", "on" if option.sequence else "off"))
    return (*grid_families(shape.grid, shape.microbatch, option.view), *names)


def grid_families(grid: Grid, microbatch: int, view: View) -> tuple[Family, ...]:
    """Of a sketch."""
    style = (("context_style", view.style),) if view.style else ()
    return (
        ("gpus", str(grid.ranks)),
        ("tensor", str(grid.tensor)),
        ("pipeline", str(grid.pipeline)),
        ("context", str(grid.context)),
        ("expert", str(grid.expert)),
        ("microbatch", str(microbatch)),
        *style,
    )


def sharing_families(grid: Grid, zero: int, shards: int) -> tuple[Family, ...]:
    """Of the data ranks."""
    level = ("zero", str(zero))
    return (level, ("sharding", "hybrid" if shards < grid.data else "full")) if zero else (level,)


def schedule_families(grid: Grid, schedule: Schedule, interleave: int) -> tuple[Family, ...]:
    if grid.pipeline == 1:
        return ()
    return ("schedule", str(schedule)), ("interleave", str(interleave))


def offload_families(offload: Offload) -> tuple[Family, ...]:
    return tuple(("offload", word) for word in offload or ("none",))


def may_be_of(family: Family, point: Point) -> bool:
    """Whether a plan inside may be of a family; of those that a spec leaves open, its space says
    so."""
    match point:
        case Floored():
            return True
        case Way():
            return family in families_at(point)
        case Turn():
            sharing = point.sharing
            names = (
                *_of_sharing(sharing),
                *schedule_families(sharing.outline.grid, point.schedule, point.interleave),
                *offload_families(point.offload),
            )
            return family in names
        case Sharing():
            return _open_or(family, _of_sharing(point))
        case Outline():
            return _open_or(family, shape_families(point))
        case Sketch():
            return _open_or(family, grid_families(point.grid, point.microbatch, point.view))


def _of_sharing(sharing: Sharing) -> tuple[Family, ...]:
    outline = sharing.outline
    names = sharing_families(outline.grid, sharing.zero, sharing.shards)
    return *shape_families(outline), *names


def _open_or(family: Family, names: Iterable[Family]) -> bool:
    """Whether a family is among them, or nothing is known of its key yet."""
    return dict(names).get(family[0], family[1]) == family[1]


def near(sketch: Sketch, mesh: Mapping[str, str], family: Family) -> bool:
    """Whether it differs from a mesh in one number, beside that which the family is about."""
    own = dict(grid_families(sketch.grid, sketch.microbatch, sketch.view))
    return sum(own[key] != mesh[key] for key in MESH if key != family[0]) <= 1


def spoken_of(space: Space) -> Iterator[Family]:
    """Families that a report names, some more than once. Others it names where the search has met
    them: uses of host memory, context and expert ranks, kernels, numbers of GPUs."""
    yield from space.choices
    for recompute in space.ranges.recomputes:
        yield "recompute", str(recompute)
    for grid in space.ranges.grids():
        for size, _ in space.ranges.microbatches(grid):
            yield "microbatch", str(size)
        yield "tensor", str(grid.tensor)
        yield "pipeline", str(grid.pipeline)
        if grid.tensor > 1:
            for sequence in space.ranges.sequences:
                yield "sequence", "on" if sequence else "off"
        for zero, shards in space.ranges.shardings(grid):
            yield from sharing_families(grid, zero, shards)
        for interleave, schedules in space.ranges.ways(grid.pipeline):
            for schedule in schedules:
                yield from schedule_families(grid, schedule, interleave)
