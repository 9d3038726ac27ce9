"""The ledger and what operators keep, for people: made from the objects of --json."""

from __future__ import annotations

from typing import Any

from llmspec.compiler.text import in_bytes, plural

MOST = 8
"""Storages of a unit that are listed one by one, the largest first."""


def render_memory(found: dict[str, Any]) -> str:
    """`found`: {"ranks", "units"}."""
    lines: list[str] = []
    for rank in found["ranks"]:
        lines += [*_account(rank, many=len(found["ranks"]) > 1), ""]
    lines.append("What autograd keeps of one use of a unit, by the operator that makes it:")
    for unit in found["units"]:
        lines += _unit(unit)
    return "\n".join(lines)


def _account(one: dict[str, Any], *, many: bool) -> list[str]:
    ranks = ", ".join(map(str, one["pipeline_ranks"]))
    whose = f"pipeline rank {ranks}, " if many else ""
    flying = one["in_flight"]
    shown = f"{flying:g}" if flying == int(flying) else f"{flying:.2f}"
    moment = f", {one['moment']}" if one["moment"] else ""
    rows = [(_what(item), in_bytes(item["bytes"])) for item in one["items"]]
    parts = [item["part"] for item in one["items"]]
    width = max(len(what) for what, _ in rows)
    lines = [
        f"Memory of {whose}{plural(one['devices'], 'device')}: "
        f"{in_bytes(one['peak_memory_bytes'])} predicted{moment}, "
        f"{shown} micro-batches in flight"
    ]
    before = ""
    for part, (what, size) in zip(parts, rows, strict=True):
        if part != before:
            lines.append(f"  {part:<{width + 4}}  {in_bytes(one['memory_bytes'][part]):>10}")
        lines.append(f"    {what:<{width + 2}}  {size:>10}")
        before = part
    return lines


def _what(item: dict[str, Any]) -> str:
    if not item["unit"]:
        return str(item["what"])
    uses = "" if item["uses"] == 1 else f"{item['uses']} x "
    return f"{item['what']}: {uses}{item['unit']}"


def _unit(one: dict[str, Any]) -> list[str]:
    words = ", ".join(one["words"])
    computed = f", computing {words} again" if words else ""
    lines = [f"  {one['unit']}{computed}: {in_bytes(one['kept_bytes'])}"]
    kept = sorted(one["kept"], key=lambda k: (-k["bytes"], k["value"]))
    for storage in kept[:MOST]:
        what = " statistics" if storage["statistics"] else ""
        by = ", ".join(storage["by"]) or "what runs again"
        name = f"{storage['value']}{what} ({storage['operator']})"
        lines.append(f"    {in_bytes(storage['bytes']):>10}  {name}, kept by {by}")
    rest = kept[MOST:]
    if rest:
        size = in_bytes(sum(k["bytes"] for k in rest))
        lines.append(f"    {size:>10}  {plural(len(rest), 'smaller one')}")
    return lines
