"""The texts and the JSON objects of `llmspec plan --pareto` and `--why-not`."""

from __future__ import annotations

from typing import Any

from llmspec.compiler.render_plan import Face, GiB
from llmspec.compiler.search.best import Told
from llmspec.compiler.search.explain import WORDS, duration, seconds
from llmspec.compiler.search.tradeoffs import Front, WhyNot

SAME = 5e-4
"""Parts that differ by a smaller share of the step, or of the peak, are not listed."""


def told_face(told: Told) -> Face:
    return {
        "plan": told.decisions,
        "words": told.words,
        "gpus": told.ranks,
        "step_time_s": told.step_s,
        "time_s": told.times_s or None,
        "peak_memory_bytes": told.peak_bytes,
        "memory_bytes": told.memory_bytes,
        "run_s": told.run_s,
    }


# --------------------------------------------------------------------------------------------------
# The front


def front_face(front: Front) -> Face:
    return {
        "schema": 1,
        "budget_bytes": front.budget_bytes,
        "limits": front.limits,
        "pareto": [told_face(point) for point in front.points],
    }


def render_front(front: Front) -> str:
    """A line a plan, the fastest first."""
    fastest = front.points[0].step_s
    assert fastest is not None, "points fit"
    sizes = {point.ranks for point in front.points}
    lines = [
        "Memory against time: nothing is both smaller and faster than any of these.",
        f"  {'GiB per gpu':>11}  {'step':>10}  {'slower':>8}  plan",
    ]
    for point in front.points:
        assert point.step_s is not None, "points fit"
        slower = f"{100 * (point.step_s / fastest - 1):.1f} %"
        where = f"{point.ranks} GPUs, " if len(sizes) > 1 else ""
        lines.append(
            f"  {point.peak_bytes / GiB:>11.2f}  {seconds(point.step_s):>10}  {slower:>8}  "
            f"{where}{point.words}"
        )
    lines.append(
        f"All predicted. The fastest plan, the smallest, and the fastest under each of "
        f"{front.limits - 1} budgets evenly between them."
    )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Why not


def why_not_face(asked: str, found: WhyNot) -> Face:
    return {
        "schema": 1,
        "asked": asked,
        "chosen": told_face(found.chosen),
        "best": told_face(found.other),
        "same": found.same,
        "late": found.late,
        "budget_bytes": found.budget_bytes,
        "excess_bytes": max(0, found.other.peak_bytes - found.budget_bytes),
    }


def render_why_not(asked: str, found: WhyNot) -> str:
    chosen, other = found.chosen, found.other
    lines = [f"Why not `{asked}`?", _side("chosen", chosen), _side("with it", other)]
    if found.same:
        return "\n".join([*lines, "It is what the search takes: nothing else is better."])
    return "\n".join([*lines, *_verdict(found), *_times(chosen, other), *_memory(chosen, other)])


def _side(name: str, told: Told) -> str:
    step = "too large" if told.step_s is None else seconds(told.step_s)
    gpus = f"{told.ranks} GPUs, "
    return f"  {name:<8}  {step:>10}  {told.peak_bytes / GiB:6.2f} GiB  {gpus}{told.words}"


def _verdict(found: WhyNot) -> list[str]:
    chosen, other = found.chosen, found.other
    if other.step_s is None:
        excess = (other.peak_bytes - found.budget_bytes) / GiB
        return [
            f"Nothing with it fits. Its smallest plan is too large by {excess:.2f} GiB "
            f"of {found.budget_bytes / GiB:.1f}."
        ]
    assert chosen.step_s is not None, "what is chosen fits"
    share = 100 * (other.step_s / chosen.step_s - 1)
    slower = f"{abs(share):.1f} % {'slower' if share >= 0 else 'faster'}"
    gained = seconds(abs(other.step_s - chosen.step_s))
    lines = [f"At its best it is {slower}, {gained} a step."]
    if abs(share) < 0.05:
        lines = ["At its best it is as fast, and less simple or less of what is preferred."]
    if found.late and other.run_s is not None:
        lines.append(f"It misses the deadline or the cost: the run takes {duration(other.run_s)}.")
    return lines


def _times(chosen: Told, other: Told) -> list[str]:
    """Parts of the step, what was lost most first."""
    if other.step_s is None:
        return []
    return _parts("exposed time", chosen.times_s, other.times_s, lambda s: f"{s * 1e3:,.1f}", "ms")


def _memory(chosen: Told, other: Told) -> list[str]:
    def gib(size: float) -> str:
        return f"{size / GiB:,.2f}"

    return _parts("memory", chosen.memory_bytes, other.memory_bytes, gib, "GiB")


def _parts(title: str, before: Any, after: Any, text: Any, unit: str) -> list[str]:
    gained = {name: after[name] - before[name] for name in after}
    least = SAME * max(sum(before.values()), sum(after.values()))
    listed = sorted((n for n in gained if abs(gained[n]) > least), key=lambda n: -gained[n])
    if not listed:
        return []
    rows = [(WORDS.get(n, n), before[n], after[n], gained[n]) for n in listed]
    rows.append(("sum", sum(before.values()), sum(after.values()), sum(gained.values())))
    return [
        f"  {f'{title}, {unit}':<28}  {'chosen':>12}  {'with it':>12}  {'difference':>12}",
        *(
            f"    {name:<26}  {text(old):>12}  {text(new):>12}  {_signed(more, text):>12}"
            for name, old, new, more in rows
        ),
    ]


def _signed(value: float, text: Any) -> str:
    return ("+" if value >= 0 else "-") + text(abs(value))
