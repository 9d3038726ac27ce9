"""The text and the JSON object of `llmspec plan`: they say the same, for one feeds the other."""

from __future__ import annotations

from typing import Any

from llmspec.compiler.plan import Plan
from llmspec.compiler.search.explain import duration, seconds
from llmspec.compiler.search.search import Found, Infeasible
from llmspec.dsl import Diagnostic

GiB = 2**30
MiB = 2**20
SHORT = {"parameters": "weights"}
COMMUNICATION = ("tensor", "context", "expert", "data", "pipeline_transfer", "offload")

BLOCK_KEYS = (
    "data",
    "shard",
    "zero",
    "tensor",
    "sequence",
    "context",
    "context_style",
    "expert",
    "pipeline",
    "schedule",
    "stages",
    "microbatch",
    "recompute",
    "offload",
    "kernels",
)
"""Keys of the `plan` block that the search decides, in the language reference's order."""

Face = dict[str, Any]


def face(found: Found | Infeasible) -> Face:
    """The object of --json; its schema is in docs/search.md."""
    if isinstance(found, Infeasible):
        return _infeasible_face(found)
    predicted = found.plan.predicted
    return {
        "schema": 1,
        "model": predicted["model"],
        "plan": predicted["plan"] | {"hash": found.plan.plan_hash},
        "predicted": predicted["predicted"],
        "search": predicted["search"] | {"seconds": found.seconds},
        "infeasible": None,
        "runners_up": [
            {"plan": words, "step_time_s": step, "peak_memory_bytes": peak}
            for words, step, peak in found.runners_up
        ],
        "lost": [
            {
                "key": lost.family[0],
                "value": lost.family[1],
                "excess_bytes": lost.excess_bytes,
                "slower": lost.slower,
                "exact": lost.exact,
                "term": lost.term,
                "text": lost.text,
            }
            for lost in found.lost
        ],
        "placed": list(found.placed),
    }


def _infeasible_face(found: Infeasible) -> Face:
    return {
        "schema": 1,
        "model": found.model,
        "plan": None,
        "predicted": None,
        "search": {
            "plans_considered": found.considered,
            "plans_pruned": found.pruned,
            "plans_that_fit": 0,
            "seconds": found.seconds,
        },
        "infeasible": {
            "goal": found.goal,
            "best": found.decisions,
            "peak_memory_bytes": found.ledger.total,
            "memory_bytes": found.ledger.parts(),
            "budget_bytes": found.budget_bytes,
            "missing_bytes": found.missing_bytes,
            "run": found.run,
            "limit": found.limit,
            "ways_out": [
                {
                    "key": way.key,
                    "change": way.change,
                    "text": way.text,
                    "line": way.span.line if way.span else None,
                    "gpus": way.ranks,
                    "peak_memory_bytes": way.peak_bytes,
                    "step_time_s": way.step_s,
                }
                for way in found.ways_out
            ],
        },
    }


# --------------------------------------------------------------------------------------------------
# For people


def render_plan(plan: Plan) -> str:
    """Headline, memory, step, and the plan as a block that can be pasted into a spec."""
    return "\n".join([*_headline(plan), "", *plan_block(plan)])


def render_found(found: Found) -> str:
    """The plan, how its blocks are split, the runners-up, and why each family lost."""
    lines = [render_plan(found.plan)]
    if found.placed:
        lines += ["", "Over the tensor ranks:", *(f"  {line}" for line in found.placed)]
    others = found.runners_up[1:]
    if others:
        lines += ["", "Next best:"]
        lines += [
            f"  {seconds(step):>10} predicted  {peak / GiB:6.1f} GiB  {words}"
            for words, step, peak in others
        ]
    if found.lost:
        lines += ["", "Why the others lost, each at its best:"]
        width = max(len(" ".join(lost.family)) for lost in found.lost)
        lines += [f"  {' '.join(lost.family):<{width}}  {lost.text}" for lost in found.lost]
    return "\n".join(lines)


def _headline(plan: Plan) -> list[str]:
    predicted, cluster = plan.predicted["predicted"], plan.predicted["cluster"]
    where = f"{cluster['devices']} x {cluster['device']}"
    lines = [f"Plan {plan.plan_hash}: {plan.model} on {where}, {mesh_words(plan)}"]
    lines += [f"  chosen  {key} = {value}" for key, value in plan.choices.items()]
    peak, budget = predicted["peak_memory_bytes"], cluster["memory_budget_bytes"]
    unit, name = (GiB, "GiB") if peak >= 4 * GiB else (MiB, "MiB")
    parts = ledger_words(predicted["memory_bytes"], unit)
    lines.append(
        f"  memory  {_size(peak, unit)} of {_size(budget, unit)} {name} predicted   {parts}"
    )
    if host := predicted["peak_host_memory_bytes"]:
        size, parts = _size(host, unit), ledger_words(predicted["host_memory_bytes"], unit)
        lines.append(f"  host    {size} {name} a process predicted   {parts}")
    lines.append(
        f"  step    {seconds(predicted['step_time_s'])} predicted   {time_words(predicted)}"
    )
    lines += recompute_lines(plan)
    lines += kernel_lines(plan)
    speed = predicted["tokens_per_s"]
    lines.append(
        f"  speed   {speed:,.0f} tokens/s predicted   {100 * predicted['mfu']:.1f} % of peak"
    )
    lines += batch_lines(predicted)
    run = predicted["run"]
    if run["days"] is not None:
        cost = "" if run["cost"] is None else f"   cost {run['cost']:,.0f}"
        lines.append(
            f"  run     {run['steps']:,} steps, {duration(run['days'] * 86400)} predicted{cost}"
        )
    return lines


def batch_lines(predicted: Face) -> list[str]:
    """Tokens of a step, on the way up to it, and beside the critical batch."""
    batch, ramp = predicted["batch"], predicted["run"]["ramp"]
    line = f"  batch   {batch['tokens_per_step']:,} tokens a step"
    if ramp:
        line += f"   after {sum(s['steps'] for s in ramp):,} steps that grow from "
        line += f"{ramp[0]['sequences']:,} sequences to it in {len(ramp) + 1} sizes"
    if batch["critical_tokens"] is not None:
        source = "given" if batch["loss_from"] == "given" else "Hoffmann 2022"
        line += f"   {batch['share_of_critical']:.2g} of the critical batch, an estimate"
        line += f" (Kaplan 2020) at a loss of {batch['loss']:.2f} ({source})"
    return [line]


def recompute_lines(plan: Plan) -> list[str]:
    """What is computed again, in how many blocks, where blocks are not all alike in a plain way."""
    decided = plan.predicted["plan"]
    if decided["recompute"] in ("none", "full"):
        return []
    lines = []
    for unit, own in decided["recompute_by_unit"].items():
        total = sum(s["blocks"] for s in own)
        counted: dict[str, int] = {}
        for stretch in own:
            if stretch["again"]:
                words = ", ".join(stretch["again"])
                counted[words] = counted.get(words, 0) + stretch["blocks"]
        for words, blocks in counted.items():
            lines.append(f"  again   {words} in {blocks} of {total} `{unit}`")
    return lines


def kernel_lines(plan: Plan) -> list[str]:
    """What fused kernels are predicted to save of the same plan."""
    predicted = plan.predicted["predicted"]
    eager = predicted.get("eager")
    if not eager:
        return []
    share = 1 - predicted["step_time_s"] / eager["step_time_s"]
    kept = predicted["memory_bytes"]["activations"], eager["activations_bytes"]
    unit, name = (GiB, "GiB") if max(kept) >= 4 * GiB else (MiB, "MiB")
    words = f"{100 * abs(share):.1f} % {'shorter' if share >= 0 else 'longer'} a step"
    words += f", activations {_size(kept[0], unit)} instead of {_size(kept[1], unit)} {name}"
    return [f"  kernels {plan.kernels}: {words} predicted, against eager"]


def ledger_words(parts: dict[str, int], unit: int) -> str:
    return "  ".join(f"{SHORT.get(k, k)} {_size(v, unit)}" for k, v in parts.items())


def _size(size_bytes: int, unit: int) -> str:
    return f"{size_bytes / unit:,.1f}" if unit == GiB else f"{size_bytes / unit:,.0f}"


def time_words(predicted: Face) -> str:
    times = predicted["time_s"]
    parts = {
        "compute": times["compute"],
        "exposed communication": sum(times[k] for k in COMMUNICATION),
        "pipeline bubble": times["pipeline_bubble"],
        "optimizer": times["optimizer"],
    }
    return "  ".join(f"{name} {seconds(value)}" for name, value in parts.items() if value)


def mesh_words(plan: Plan) -> str:
    mesh = plan.mesh
    words = [f"data {mesh.data}", f"zero {plan.zero}"]
    if mesh.expert > 1:
        words.append(f"expert {mesh.expert}")
    if mesh.tensor > 1:
        words.append(f"tensor {mesh.tensor}")
    if mesh.context > 1:
        words.append(f"context {mesh.context} ({plan.context_style})")
    if mesh.pipeline > 1:
        words.append(f"pipeline {mesh.pipeline}")
    return ", ".join(words)


def plan_block(plan: Plan) -> list[str]:
    """`plan { … }` with every decision that the language can say."""
    decided = plan.predicted["plan"]
    rows = []
    for key in BLOCK_KEYS:
        value = _block_value(plan, key, decided[key])
        if value is not None:
            rows.append((key, value))
    width = max(len(key) for key, _ in rows)
    return ["plan {", *(f"    {key:<{width}} = {value}" for key, value in rows), "}"]


def _block_value(plan: Plan, key: str, value: Any) -> str | None:
    """None for what follows from the rest, or has no word in the language."""
    match key:
        case "shard" if plan.zero == 0:
            return None
        case "sequence" if plan.mesh.tensor == 1:
            return None
        case "context" | "context_style" if plan.mesh.context == 1:
            return None
        case "expert" if not _has_experts(plan):
            return None
        case "schedule" | "stages" if plan.mesh.pipeline == 1:
            return None
        case "offload" if isinstance(value, list):
            return str(value[0]) if len(value) == 1 else f"[{', '.join(value)}]"
        case "offload":
            return None
        case "kernels" if value == "eager":
            return None
        case "stages":
            return f"[{', '.join(map(str, value))}]"
    return str(value)


def _has_experts(plan: Plan) -> bool:
    model = plan.predicted["model"]
    return bool(model["parameters_active"] < model["parameters"])


PARTS = {
    "parameters": "weights as they are stored",
    "gradients": "gradients as they add up",
    "optimizer": "the optimizer's state",
    "activations": "values kept for the backward",
    "buffers": "weights as they are gathered, and what operators work with",
    "fixed": "what CUDA, NCCL and the allocator keep, whatever the plan",
}
"""What the parts of a ledger are."""


def infeasible_fault(found: Infeasible) -> Diagnostic:
    """What is missing, of what there is most, the ways out and the lines that they change."""
    own = found.span
    return Diagnostic(
        code="E0412" if found.goal == "memory" else "E0415",
        message="no plan fits the memory budget"
        if found.goal == "memory"
        else f"no plan that fits the memory keeps to the {found.goal}",
        span=own,
        label=_missed(found),
        secondary=tuple(
            (way.span, "another way out" if i else "a way out")
            for i, way in enumerate(w for w in found.ways_out if w.span and w.span != own)
            if way.span is not None
        ),
        notes=_notes(found),
        helps=tuple(way.text for way in found.ways_out),
    )


def _missed(found: Infeasible) -> str:
    if found.run is None:
        return f"the smallest plan needs {found.ledger.total / GiB:.1f} GiB"
    if found.goal == "deadline":
        return f"the fastest plan takes {duration(found.run['days'] * 86400)}"
    return f"the cheapest plan costs {found.run['cost']:,.0f}"


def _notes(found: Infeasible) -> tuple[str, ...]:
    if found.run is not None:
        steps, hours = found.run["steps"], found.run["gpu_hours"]
        return (f"{steps:,} steps, {hours:,.0f} GPU hours predicted: {found.best}",)
    parts = {k: v for k, v in found.ledger.parts().items() if v}
    largest = sorted(parts, key=lambda name: -parts[name])
    missing, budget = found.missing_bytes / GiB, found.budget_bytes / GiB
    return (
        f"{missing:.2f} GiB are missing of {budget:.1f}: {found.best}",
        f"at its peak, GiB: {ledger_words({name: parts[name] for name in largest}, GiB)}",
        *(
            f"{SHORT.get(name, name)} {parts[name] / GiB:.1f} GiB: {PARTS[name]}"
            for name in largest[:2]
            if parts[name] > found.ledger.total / 20
        ),
    )
