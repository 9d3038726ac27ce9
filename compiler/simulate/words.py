"""What people read of a simulated step: made from the object of --json, so the two agree."""

from __future__ import annotations

from typing import Any

from llmspec.compiler.search.explain import seconds
from llmspec.compiler.text import plural

MANY = 12
"""Pipeline ranks that are listed one by one; of more, the busiest and the idlest."""


def render_simulated(found: dict[str, Any]) -> str:
    ranks = found["ranks"]
    lines = [
        f"Plan {found['plan']}: one step takes {seconds(found['step_time_s'])} predicted, "
        f"{plural(found['microbatches'], 'micro-batch')}",
        f"  waiting  {100 * found['bubble_fraction']:.1f} % of all ranks' time",
        f"  exposed  {_parts(found['exposed_s']) or 'no communication'}",
    ]
    path = found["critical_path"]
    lines.append(f"  path     {_parts(path['time_s'])}")
    if len(ranks) > 1:
        own = ", ".join(f"{seconds(s)} on {r}" for r, s in path["ranks_s"].items())
        lines.append(f"           over pipeline ranks: {own}")
        lines += ["", *_table(ranks)]
    return "\n".join(lines)


def _parts(parts: dict[str, float]) -> str:
    shown = sorted(((s, n) for n, s in parts.items() if s), reverse=True)
    return "  ".join(f"{name.replace('_', ' ')} {seconds(spent)}" for spent, name in shown)


def _table(ranks: list[dict[str, Any]]) -> list[str]:
    lines = []
    shown = ranks
    if len(ranks) > MANY:
        by_waiting = sorted(ranks, key=lambda r: r["waiting_s"])
        kept = {r["pipeline_rank"] for r in (*by_waiting[: MANY // 2], *by_waiting[-MANY // 2 :])}
        shown = [r for r in ranks if r["pipeline_rank"] in kept]
    for one in shown:
        first, last = one["devices"]
        where = f"device {first}" if first == last else f"devices {first} to {last}"
        lines.append(
            f"  rank {one['pipeline_rank']:>2}  {where:<24} waits {seconds(one['waiting_s']):>8}  "
            f"{_parts(one['time_s'])}"
        )
    if len(shown) < len(ranks):
        lines.append(f"  … and {len(ranks) - len(shown)} pipeline ranks between these")
    return lines
