"""From a model's graph and a plan to the lowered units that emission prints: the ordered passes."""

from __future__ import annotations

from dataclasses import dataclass

from llmspec.compiler.errors import InternalError
from llmspec.compiler.graph import Instance, ModelGraph, Unit
from llmspec.compiler.kernels.kinds import EAGER
from llmspec.compiler.kernels.measured import NOTHING, Measured
from llmspec.compiler.kernels.naming import name_kernels
from llmspec.compiler.orders import Schedule
from llmspec.compiler.passes.fuse import fuse_unit
from llmspec.compiler.passes.recompute import check_recompute, lists_of
from llmspec.compiler.passes.shard import shard_unit, whole_placement
from llmspec.compiler.passes.split_backward import leave_weights_for_later
from llmspec.compiler.plan import Plan, UnitPlacement
from llmspec.compiler.views import seen, view_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """One rank's program, before it is printed.

    model: the user's graph. whole: what one context and expert rank sees of it, which tensor ranks
        share. units: local graphs by unit name. measured: of kernels, on the plan's cluster.
    """

    plan: Plan
    model: ModelGraph
    whole: ModelGraph
    units: dict[str, Unit]
    placements: dict[str, UnitPlacement]
    measured: Measured = NOTHING

    def blocks(self) -> tuple[Instance, ...]:
        """The chain without its first and last unit."""
        return self.whole.instances[1:-1]


def lower(graph: ModelGraph, plan: Plan, measured: Measured = NOTHING) -> Lowered:
    """Apply the passes in order: split tokens over context ranks and experts over expert ranks,
    shard over the tensor axis, fuse operators into kernels, mark what a split backward leaves for
    later; stages and recomputation are the plan's. `measured`: of kernels, on the plan's cluster.

    Errors: InternalError when plan and graph do not belong together; Refused for operators to
    recompute that the model does not have.
    """
    if plan.stages[0][0] != 0 or plan.stages[-1][1] != len(graph.instances):
        raise InternalError("the plan's stages do not cover the model")
    model, ranks = graph, plan.mesh.tensor
    graph = seen(model, view_of(plan))
    placements = {
        name: plan.placements[name] if ranks > 1 else whole_placement(unit)
        for name, unit in graph.units.items()
    }
    units = {name: shard_unit(unit, placements[name], ranks) for name, unit in graph.units.items()}
    check_recompute(units, graph.instances, plan.recompute)
    if plan.kernels != EAGER:
        units = {
            n: fuse_unit(u, lists_of(plan.recompute.get(n, ())), measured=measured, by=plan.kernels)
            for n, u in units.items()
        }
        name_kernels(units.values())
    if len(plan.stages) > 1 and Schedule(plan.schedule).splits:
        for unit in units.values():
            leave_weights_for_later(unit)
    return Lowered(
        plan=plan,
        model=model,
        whole=graph,
        units=units,
        placements=placements,
        measured=measured,
    )
