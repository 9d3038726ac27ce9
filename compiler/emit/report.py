"""Print report.html: what the plan decided and predicts, for the eye. One file, no scripts, nothing
from the network; the same plan gives the same bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
from torch import fx

from llmspec.compiler.cost.hardware import machine_of
from llmspec.compiler.cost.play import GATHER, PARTIAL, REDUCE, TIED, UPDATE
from llmspec.compiler.cost.types import types_of
from llmspec.compiler.emit.header import Header
from llmspec.compiler.forecast import Forecast, forecast
from llmspec.compiler.graph import Unit
from llmspec.compiler.lower import Lowered
from llmspec.compiler.ops.collective import Move, is_collective, sends
from llmspec.compiler.ops.registry import entry_of
from llmspec.compiler.placement import Collective
from llmspec.compiler.plan import Plan
from llmspec.compiler.schedules import COMPUTES
from llmspec.compiler.text import in_bytes, plural, quoted
from llmspec.dsl.program import Program

WIDTH = 960
"""Of every drawing, in pixels."""

COLOURS = {
    "parameters": "#4e79a7",
    "gradients": "#a0cbe8",
    "optimizer": "#f28e2b",
    "activations": "#59a14f",
    "buffers": "#b6992d",
    "fixed": "#bab0ac",
    "compute": "#59a14f",
    "tensor": "#4e79a7",
    "context": "#499894",
    "expert": "#86bcb6",
    "data": "#f28e2b",
    "pipeline_bubble": "#e6e3e1",
    "pipeline_transfer": "#b07aa1",
    "offload": "#9d7660",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A piece of a stacked bar, in pixels; `value` is the number that it shows, in base units."""

    name: str
    value: float
    text: str
    x: float
    width: float
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A stacked bar with its total. `mark`: where a limit stands, in pixels."""

    title: str
    total: float
    text: str
    bars: tuple[Bar, ...]
    mark: float | None = None


def rounded(pixels: float) -> float:
    return round(pixels, 2)


def seconds(value: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"


def stacked(
    parts: Mapping[str, float], scale: float, text: Callable[[float], str]
) -> tuple[Bar, ...]:
    """Parts that are there, side by side; `scale`: pixels of one unit."""
    bars, x = [], 0.0
    for name, value in parts.items():
        if value > 0:
            bars.append(
                Bar(
                    name=name.replace("_", " "),
                    value=value,
                    text=text(value),
                    x=rounded(x),
                    width=rounded(value * scale),
                    colour=COLOURS[name],
                )
            )
        x += value * scale
    return tuple(bars)


def memory_rows(known: Forecast, budget_bytes: int) -> tuple[Row, ...]:
    """One bar a pipeline rank; the budget is the mark."""
    longest = max(budget_bytes, *(s.memory.total for s in known.stages))
    scale = WIDTH / longest
    rows = []
    for rank in sorted({stage.rank for stage in known.stages}):
        own = [i for i, stage in enumerate(known.stages) if stage.rank == rank]
        memory, blocks = known.stages[own[0]].memory, sum(known.stages[i].blocks for i in own)
        named = "stage" if len(own) == 1 else "stages"
        rows.append(
            Row(
                title=f"{named} {', '.join(map(str, own))}, {plural(blocks, 'block')}"
                if known.stages[1:]
                else "",
                total=memory.total,
                text=in_bytes(memory.total),
                bars=stacked(memory.parts(), scale, in_bytes),
                mark=rounded(budget_bytes * scale),
            )
        )
    return tuple(rows)


def time_row(parts: dict[str, float]) -> Row:
    total = sum(parts.values())
    return Row(
        title="",
        total=total,
        text=seconds(total),
        bars=stacked(parts, WIDTH / total if total else 0.0, seconds),
    )


# --------------------------------------------------------------------------------------------------
# The timeline

LANE = 26
ONCE = (GATHER, REDUCE, TIED, PARTIAL, UPDATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One pipeline rank: outlines of its forwards, its backwards and what it does once a step as
    SVG paths, and numbers that have room."""

    name: str
    y: int
    forward: str
    backward: str
    late: str
    once: str
    numbers: tuple[tuple[float, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    lanes: tuple[Lane, ...]
    total_s: float
    text: str
    height: int


def timeline(plan: Plan, known: Forecast) -> Timeline:
    end = max(e.stop_s for e in known.events)
    scale = WIDTH / end
    lanes = []
    for rank in range(plan.mesh.pipeline):
        own = [e for e in known.events if e.rank == rank]
        y = rank * LANE
        paths = {
            kind: "".join(
                f"M{rounded(e.start_s * scale)} {y}h{rounded(e.spent_s * scale)}"
                f"v{LANE - 4}H{rounded(e.start_s * scale)}z"
                for e in own
                if e.kind == kind
            )
            for kind in (*COMPUTES, *ONCE)
        }
        numbers = tuple(
            (rounded((e.start_s + e.stop_s) / 2 * scale), e.microbatch)
            for e in own
            if e.kind in COMPUTES and e.microbatch is not None and e.spent_s * scale > 14
        )
        lanes.append(
            Lane(
                name=f"rank {rank}",
                y=y,
                forward=paths["F"],
                backward=paths["B"] + paths["I"],
                late=paths["W"],
                once="".join(paths[kind] for kind in ONCE),
                numbers=numbers,
            )
        )
    return Timeline(lanes=tuple(lanes), total_s=end, text=seconds(end), height=len(lanes) * LANE)


# --------------------------------------------------------------------------------------------------
# A block's graph

STEP = 24
ARCS = 130
"""Pixels kept for the curves on the left of the operators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One line of a block's graph. kind: value, operator or collective."""

    kind: str
    y: int
    name: str
    does: str
    state: str
    arcs: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """A unit's graph: operators top to bottom, each value's curve to those who read it."""

    name: str
    uses: int
    nodes: tuple[Node, ...]
    height: int


def drawing(lowered: Lowered, name: str) -> Drawing:
    unit = lowered.units[name]
    shown = [n for n in unit.nodes() if n.op in ("placeholder", "call_function")]
    places = {node: i * STEP + STEP // 2 for i, node in enumerate(shown)}
    nodes = tuple(
        Node(
            kind=_kind(node),
            y=places[node],
            name=_value_name(node),
            does=_does(node, unit, lowered.placements[name].parameters),
            state=_state(node, lowered.plan.mesh.tensor),
            arcs=tuple(_arc(places[a], places[node]) for a in node.all_input_nodes if a in places),
        )
        for node in shown
    )
    uses = sum(i.unit == name for i in lowered.whole.instances)
    return Drawing(name=name, uses=uses, nodes=nodes, height=len(shown) * STEP)


def _arc(above: int, below: int) -> str:
    x = ARCS - 6
    bend = x - min(ARCS - 12, 10 + (below - above) // 3)
    return f"M{x} {above}C{bend} {above} {bend} {below} {x} {below}"


def _kind(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "value"
    return "collective" if is_collective(node) else "operator"


def _value_name(node: fx.Node) -> str:
    dims = node.meta.get("dims", "")
    label = str(node.meta.get("label") or node.name)
    return f"{label}_{dims}" if dims else label


def _does(node: fx.Node, unit: Unit, states: dict[str, str]) -> str:
    if node.op == "placeholder":
        return "input"
    if is_collective(node):
        return _moves(node)
    weights = [a.meta["parameter"] for a in node.all_input_nodes if a.op == "get_attr"]
    shown = [f"{w.path} {list(w.shape)} {states.get(w.path, 'whole')}" for w in weights]
    return " · ".join([entry_of(node).name, *shown])


def _moves(node: fx.Node) -> str:
    move: Move = node.meta["move"]
    quiet = (Collective.NONE, Collective.SLICE)
    directions = zip(
        ("forward", "backward"), (move.conversion.forward, move.conversion.backward), strict=True
    )
    words = [f"{kind} {direction}" for direction, kind in directions if kind not in quiet]
    what = ", ".join(words) if sends(node) else "nothing sent"
    return f"{move.conversion.function} over {move.axis}: {what}"


def _state(node: fx.Node, ranks: int) -> str:
    if ranks == 1:
        return ""
    if is_collective(node):
        move: Move = node.meta["move"]
        return f"{move.have} → {move.want}"
    return str(node.meta.get("state", ""))


# --------------------------------------------------------------------------------------------------
# The page


def decided(own: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, value) of the plan in the language's words; keys that say nothing are left out."""
    for key, value in own.items():
        if value is None or key == "recompute_by_unit":
            continue
        if isinstance(value, list):
            runs = ", ".join(map(str, value))
            yield key, f"[{runs}]"
        else:
            yield key, str(value)


def summary(predicted: dict[str, Any]) -> list[tuple[str, float, str]]:
    """(name, value, text) of the numbers anyone asks for first."""
    return [
        ("step_time_s", predicted["step_time_s"], seconds(predicted["step_time_s"])),
        ("tokens_per_s", predicted["tokens_per_s"], f"{predicted['tokens_per_s']:,.0f}"),
        ("mfu", predicted["mfu"], f"{100 * predicted['mfu']:.1f} %"),
        ("hfu", predicted["hfu"], f"{100 * predicted['hfu']:.1f} %"),
        (
            "peak_memory_bytes",
            predicted["peak_memory_bytes"],
            in_bytes(predicted["peak_memory_bytes"]),
        ),
        (
            "bubble_fraction",
            predicted["bubble_fraction"],
            f"{100 * predicted['bubble_fraction']:.1f} %",
        ),
    ]


def print_report(program: Program, lowered: Lowered) -> str:
    """The page, whole. Errors: Unsupported when the plan cannot be priced."""
    plan = lowered.plan
    known = forecast(program, plan, lowered.model)
    predicted = known.predicted
    machine = machine_of(program.cluster, types_of(program.train))
    repeated = dict.fromkeys(i.unit for i in lowered.whole.instances if i.prefix)
    values = {
        "header": Header(plan, quoted(plan.spec)).lines()[0],
        "plan": plan,
        "device": program.cluster.device.name,
        "peak_flops": machine.peak_flops,
        "width": WIDTH,
        "decided": list(decided(known.decided)),
        "summary": summary(predicted),
        "memory": memory_rows(known, program.budget.memory_bytes),
        "memory_parts": predicted["memory_bytes"],
        "budget_bytes": program.budget.memory_bytes,
        "time": time_row(predicted["time_s"]),
        "timeline": timeline(plan, known),
        "splits": any(stage.late_s for stage in known.stages),
        "lane": LANE,
        "stages": known.stages,
        "send_s": known.send_s,
        "collectives": predicted["collectives"],
        "drawings": [drawing(lowered, name) for name in repeated],
        "arcs": ARCS,
        "replicated": lowered.whole.replicated,
        "seconds": seconds,
        "in_bytes": in_bytes,
        "colours": COLOURS,
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmspec.compiler.emit"),
        autoescape=True,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.jinja").render(values)
