"""From a program to its plan: every legal one priced, the best few played, the winner explained."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from llmspec.compiler.cost.unit import resolve
from llmspec.compiler.errors import Refused
from llmspec.compiler.passes.recompute import stretches
from llmspec.compiler.plan import Plan
from llmspec.compiler.search.best import chosen_of
from llmspec.compiler.search.blocks import Problem, time_prices
from llmspec.compiler.search.candidates import Candidate
from llmspec.compiler.search.chain import Build
from llmspec.compiler.search.compare import placement_text
from llmspec.compiler.search.explain import Lost, describe, distinct, explain
from llmspec.compiler.search.infeasible import Infeasible, nothing_fits, too_late
from llmspec.compiler.search.meshes import nearest_batches
from llmspec.compiler.search.policies import check_listed
from llmspec.compiler.search.predicted import model_object, plan_object, predicted_object
from llmspec.compiler.search.space import Space
from llmspec.compiler.search.walk import Walk
from llmspec.dsl.diagnostics import Diagnostic, Fault
from llmspec.dsl.mesh_pins import check_heads
from llmspec.dsl.pins import Pins as DslPins
from llmspec.dsl.program import Program
from llmspec.dsl.units import render_bytes

__all__ = ["Found", "Infeasible", "search"]

RUNNERS_UP = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A plan under the budget.

    runners_up: the next best, the winner first, as (words, predicted step in s, peak bytes).
    lost: why each family lost. placed: how the blocks are split over the tensor axis, and what that
        saves, in lines. pruned: plans that bounds left out. seconds: how long the search took; not
        part of the plan.
    """

    plan: Plan
    runners_up: tuple[tuple[str, float, int], ...]
    lost: tuple[Lost, ...]
    placed: tuple[str, ...]
    considered: int
    pruned: int
    fit: int
    seconds: float


@contextmanager
def no_collection() -> Iterator[None]:
    """Python's cyclic collector stands still: a search keeps nearly all that it makes, and walking
    through that again and again took an eighth of its time (Llama 3 of 70 billion, 32 nodes)."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def search(program: Program, build: Build) -> Found | Infeasible:
    """`build(B)` gives the model's graph for micro-batches of B sequences.

    Errors: Unsupported for pins without meaning; Refused for a batch that no mesh divides, and for
    pins that no mesh satisfies.
    """
    with no_collection():
        return search_all(program, build)


def search_all(program: Program, build: Build) -> Found | Infeasible:
    """`search`, with the collector as it is."""
    start = time.perf_counter()
    space = Space.of(program, build)
    spaces = space.apart()
    check_meshes(spaces)
    walk = Walk(spaces, space.objective)
    walk.run()
    if walk.fit:
        return _found(space, walk, start)
    if space.limits.any and (late := too_late(space, walk, start)):
        return late
    if walk.smallest is not None:
        return nothing_fits(space, walk, walk.smallest, start)
    needed = [s.host_needed for s in spaces if s.host_needed is not None]
    if needed:
        raise _no_host_memory(space, min(needed))
    raise no_mesh(program, "no plan satisfies every line of the `plan` block")


def _found(space: Space, walk: Walk, start: float) -> Found:
    walk.look_around()
    winner, played = chosen_of(space, walk)
    space = space.home(winner)
    ranked = sorted(played.values(), key=space.objective.rank)
    runners = distinct(ranked)[: 1 + RUNNERS_UP]
    return Found(
        plan=plan_of(space, winner, walk),
        runners_up=tuple((describe(c), c.step_s, c.peak_bytes) for c in runners),
        lost=explain(winner, walk.tally, played, space),
        placed=tuple(placed(space, winner)),
        considered=walk.considered,
        pruned=walk.pruned,
        fit=walk.fit,
        seconds=time.perf_counter() - start,
    )


def placed(space: Space, winner: Candidate) -> list[str]:
    """Of each repeated block, when there are tensor ranks."""
    option = winner.shape.option
    if option.ranks == 1:
        return []
    graph = space.graph(winner.shape.microbatch, option.view)
    lines = []
    for name in dict.fromkeys(i.unit for i in graph.instances if i.prefix):
        lines += placement_text(
            Problem(
                unit=graph.units[name],
                ranks=option.ranks,
                sequence=option.sequence,
                where=option.where,
                inner=option.inner,
                machine=space.machine,
                types=space.types,
                prices=time_prices(space.machine, space.types, winner.shape.microbatches),
            ),
            resolve(graph.units[name], option.placements[name], option.ranks),
        )
    return lines


def plan_of(space: Space, winner: Candidate, walk: Walk) -> Plan:
    program, shape, mesh = space.program, winner.shape, winner.mesh
    lists: dict[int, tuple[tuple[str, ...], ...]] = {}
    if mesh.pipeline > 1:
        smaller = [size // mesh.data // shape.microbatch for _, size in program.train.ramp_stages]
        for count in (*smaller, shape.microbatches):
            made = space.pricing.action_lists(
                winner.schedule, len(shape.cut), mesh.pipeline, count, winner.zero
            )
            lists[count] = tuple(made[rank] for rank in sorted(made))
    return Plan(
        # not the way to it: emitted bytes must not depend on where the compiler is called
        spec=os.path.basename(program.path),
        spec_hash=program.source_hash,
        model=program.model.name,
        train=program.train.name,
        mesh=mesh,
        zero=winner.zero,
        sequence=shape.option.sequence,
        microbatch=shape.microbatch,
        microbatches=shape.microbatches,
        schedule=str(winner.schedule),
        context_style=shape.option.view.style,
        offload=winner.offload,
        loss_rows=shape.option.view.loss_rows,
        kernels=shape.option.kernels,
        choices=dict(winner.choices),
        stages=shape.cut,
        recompute=stretches(space.graph(1).instances, winner.recompute),
        placements=shape.option.placements,
        actions=lists.pop(shape.microbatches, ()),
        ramp_actions={str(count): rows for count, rows in lists.items()},
        predicted={
            "model": model_object(space),
            "plan": plan_object(space, winner),
            "predicted": predicted_object(space, winner),
            "search": {
                "plans_considered": walk.considered,
                "plans_pruned": walk.pruned,
                "plans_that_fit": walk.fit,
            },
            "cluster": {
                "device": program.cluster.device.name,
                "devices": mesh.world_size,
                "memory_budget_bytes": program.budget.memory_bytes,
            },
        },
    )


def _no_host_memory(space: Space, needed_bytes: int) -> Refused:
    """Every plan that the lines allow puts more there than there is. needed_bytes: of a rank."""
    program = space.program
    here = min(program.cluster.devices_per_node, program.cluster.world_size)
    needed, there = needed_bytes * here, space.host_bytes * here
    pinned = next((c for c in program.plan if c.key == "offload"), None)
    return Refused(
        Diagnostic(
            code="E0414",
            message=f"`offload` needs {render_bytes(needed)} of host memory on each node",
            span=pinned.span if pinned is not None else program.train.span,
            label=f"a node has {render_bytes(there)}",
            helps=("say what it has, `host_memory` in the cluster, if that is a guess",),
        )
    )


def no_mesh(program: Program, message: str) -> Refused:
    span = program.plan[0].span if program.plan else program.train.span
    label = f"{program.cluster.world_size} devices, batches of {program.train.batch_sequences}"
    return Refused(Diagnostic(code="E0404", message=message, span=span, label=label))


def check_meshes(spaces: Sequence[Space]) -> None:
    """Errors: Refused when no mesh satisfies the pins, or none divides the batch; for an operator
    to be computed again that no block has."""
    program, pins = spaces[0].program, spaces[0].pins
    listing = pins.listing("recompute")
    if listing is not None:
        check_listed(spaces[0].graph(1), pins.recomputed_operators(), listing.span)
    lines = DslPins(
        constraints=program.plan, model=program.model, cluster=program.cluster, train=program.train
    )
    try:
        # of a model from elsewhere the heads are known only now
        check_heads(lines, spaces[0].ranges.heads)
    except Fault as error:
        raise Refused(error.diagnostic) from None
    grids = [grid for space in spaces for grid in space.ranges.grids()]
    if not grids:
        worlds = {space.ranks for space in spaces}
        world, most = max(worlds), "at most " if len(worlds) > 1 else ""
        raise no_mesh(program, f"no mesh of {most}{world} devices satisfies the `plan` block")
    batch = program.train.common_sequences
    if all(batch % grid.data for grid in grids):
        near = nearest_batches(batch, sorted({g.data for g in grids}))
        tokens = program.train.sequence_length
        works = " and ".join(f"{n} sequences ({n * tokens:,} tokens)" for n in near)
        raise Refused(
            Diagnostic(
                code="E0408",
                message=f"no mesh divides a batch of {batch} sequences",
                span=program.train.key_spans.get("batch", program.train.span),
                label=f"{batch} sequences of {tokens} tokens",
                helps=(f"the nearest batches that work are {works}",),
            )
        )
