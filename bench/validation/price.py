"""One published run in, what the compiler predicts of it out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bench.validation.profiles import Profile, profile_of
from bench.validation.rows import Row
from bench.validation.specs import Missing, spec_text
from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.search.search import Found
from llmspec.dsl.program import Program

UNBOUNDED_BYTES = 1 << 60
"""The memory budget of every pricing, so that a plan that we would reject has a price too."""


OF_ALL = {"early_stop": 0.0, "whole_logits": 1.0}
"""A block that was recomputed ran to its end: torch.utils.checkpoint stops early since 2.1 (2023),
later than all runs here that recompute. Logits were made before the loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """step_s: None when the run cannot be priced, for `reason`. parts: of the time and of the
    memory, by name. usable_bytes: what the device can hand out."""

    id: str
    step_s: float | None = None
    peak_bytes: int | None = None
    usable_bytes: int | None = None
    time_s: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None


def price(row: Row) -> Priced:
    """Through the compiler's own driver: load, build, search under pins that leave one plan."""
    profile = profile_of(row)
    try:
        program = dsl.load(f"{row.id}.llmspec", text=spec_text(row, profile))
        made = driver.find_plan(driver.Session(adapted(program, profile)))
    except Missing as error:
        return Priced(id=row.id, reason=f"not in the language: {error}")
    except dsl.SpecError as error:
        return Priced(id=row.id, reason=error.diagnostics[0].message)
    assert isinstance(made, Found), "an unbounded budget holds every plan"
    predicted = made.plan.predicted["predicted"]
    return Priced(
        id=row.id,
        step_s=predicted["step_time_s"],
        peak_bytes=predicted["peak_memory_bytes"],
        usable_bytes=program.cluster.device.usable_bytes,
        time_s=predicted["time_s"],
        memory_bytes=predicted["memory_bytes"],
    )


def adapted(program: Program, profile: Profile, *, bounded: bool = False) -> Program:
    """The profile's constants in place of the device's, and memory without bound unless asked."""
    device = program.cluster.device
    own = profile.by_gpu.get(device.name, {})
    constants = {**device.constants, **OF_ALL, **profile.constants, **own}
    cluster = replace(program.cluster, device=replace(device, constants=constants))
    program = replace(program, cluster=cluster)
    if bounded:
        return program
    return replace(program, budget=replace(program.budget, memory_bytes=UNBOUNDED_BYTES))
