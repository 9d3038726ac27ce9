"""What differs between two plans: decisions, and the numbers predicted of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llmspec.compiler.plan import Plan
from llmspec.compiler.search.explain import seconds
from llmspec.compiler.text import in_bytes

NUMBERS = {
    "step_time_s": seconds,
    "tokens_per_s": lambda value: f"{value:,.0f}",
    "mfu": lambda value: f"{100 * value:.1f} %",
    "peak_memory_bytes": in_bytes,
    "peak_host_memory_bytes": in_bytes,
}
"""Of `predicted`, with how each is said."""
PARTS = {"time_s": seconds, "memory_bytes": in_bytes, "host_memory_bytes": in_bytes}
SAME = 1e-6
"""Relative: predictions are kept to nine digits."""

Change = dict[str, Any]


def differences(old: Plan, new: Plan) -> dict[str, Any]:
    """The object of `llmspec diff --json`: {"plans", "decisions", "predicted"}. before or after is
    None where there is nothing."""
    return {
        "schema": 1,
        "plans": [old.plan_hash, new.plan_hash],
        "decisions": _changes(_decisions(old), _decisions(new)),
        "predicted": _moved(_numbers(old), _numbers(new)),
    }


def _changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[Change]:
    return [
        {"key": key, "before": before.get(key), "after": after.get(key)}
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _moved(before: Mapping[str, float], after: Mapping[str, float]) -> list[Change]:
    found = []
    for key in [*before, *(k for k in after if k not in before)]:
        old, new = before.get(key, 0.0), after.get(key, 0.0)
        if abs(new - old) > SAME * max(abs(old), abs(new)):
            found.append({"key": key, "before": old, "after": new})
    return found


def _numbers(plan: Plan) -> dict[str, float]:
    """Flat: "step_time_s", "time_s.compute"."""
    known = plan.predicted.get("predicted", {})
    flat = {name: known[name] for name in NUMBERS if name in known}
    for group in PARTS:
        flat |= {f"{group}.{part}": value for part, value in known.get(group, {}).items()}
    return flat


# --------------------------------------------------------------------------------------------------
# Decisions, one line each


def _decisions(plan: Plan) -> dict[str, str]:
    """Flat: placements by unit and node."""
    flat: dict[str, str] = {}
    for key, value in plan.decisions().items():
        match key:
            case "actions":
                flat[key] = _lists(value)
            case "ramp_actions":
                flat |= {f"{key}.{count}": _lists(rows) for count, rows in value.items()}
            case "recompute":
                flat |= {f"{key}.{name}": _stretches(own) for name, own in value.items()}
            case "choices":
                flat |= value
            case "mesh":
                flat |= {f"{key}.{name}": str(inner) for name, inner in value.items()}
            case "placements":
                flat |= _placed(value)
            case _:
                flat[key] = str(value)
    return flat


def _lists(rows: Sequence[Sequence[str]]) -> str:
    """Too long for a line: how many, and six digits over them."""
    if not rows:
        return "none"
    digits = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:6]
    return f"{sum(len(row) for row in rows)} actions on {len(rows)} ranks ({digits})"


def _stretches(own: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"{s['blocks']} x {_again(s['again'])}" for s in own)


def _again(operators: Sequence[str] | str) -> str:
    if isinstance(operators, str):
        return operators
    return f"[{', '.join(operators)}]" if operators else "none"


def _placed(placements: dict[str, Any]) -> dict[str, str]:
    flat: dict[str, str] = {}
    for unit, placement in placements.items():
        for kind in ("nodes", "parameters"):
            flat |= {f"{unit}.{name}": state for name, state in placement[kind].items()}
        flat |= {f"{unit}.{end}": placement[end] for end in ("boundary_in", "boundary_out")}
    return flat


# --------------------------------------------------------------------------------------------------
# For people


def render_changes(old: Plan, new: Plan) -> str:
    """One line a decision that differs, and a count."""
    return "\n".join(_decision_lines(differences(old, new)["decisions"]))


def render_differences(found: dict[str, Any]) -> str:
    """Of the object of --json."""
    before, after = found["plans"]
    if not found["decisions"] and not found["predicted"]:
        return f"Plan {before}: no changes"
    lines = [f"Plan {before} -> {after}"] if before != after else [f"Plan {before}, both"]
    if found["decisions"]:
        lines += _decision_lines(found["decisions"])
    else:
        lines.append("The same decisions.")
    if found["predicted"]:
        width = max(len(one["key"]) for one in found["predicted"])
        lines += ["", "Predicted:"]
        lines += [f"  {one['key']:<{width}}  {_number(one)}" for one in found["predicted"]]
    return "\n".join(lines)


def _decision_lines(changes: Sequence[Change]) -> list[str]:
    lines = []
    for one in changes:
        key, before, after = one["key"], one["before"], one["after"]
        if before is None:
            lines.append(f"  + {key}  {after}")
        elif after is None:
            lines.append(f"  - {key}  {before}")
        else:
            lines.append(f"  ~ {key}  {before} -> {after}")
    signs = [line[2] for line in lines]
    added, changed, dropped = (signs.count(sign) for sign in "+~-")
    return [*lines, f"Plan: {added} to add, {changed} to change, {dropped} to drop."]


def _number(one: Change) -> str:
    say = NUMBERS.get(one["key"]) or PARTS[one["key"].partition(".")[0]]
    before, after = one["before"], one["after"]
    share = f"  ({100 * (after / before - 1):+.1f} %)" if before else ""
    return f"{say(before)} -> {say(after)}{share}"
