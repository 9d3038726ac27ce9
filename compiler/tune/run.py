"""Tuning from beginning to end: a program with kernels, a process that measures, the best."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmspec.compiler import driver
from llmspec.compiler.calibrate.run import Setting, lines_of, setting_here
from llmspec.compiler.cost.types import types_of
from llmspec.compiler.driver import Session
from llmspec.compiler.emit.package import RUNTIME
from llmspec.compiler.plan import Plan
from llmspec.compiler.precision import precision_of
from llmspec.compiler.search.search import Infeasible
from llmspec.compiler.tune.cases import Tuned, case_of, moved_bytes, tuned_groups
from llmspec.dsl.tuned import TunedKernel, TunedPass

Tell = Callable[[str, int, int], None]
"""Told (what was measured, how many measurements are done, of how many)."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class NothingToTune(Exception):
    """The message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """seconds: of one measurement. tiles: measured of one direction of a kernel at most."""

    seconds: float = 0.03
    tiles: int = 24


def tune(session: Session, effort: Effort, tell: Tell) -> list[TunedKernel]:
    """Of every kernel of the spec's plan, at the plan's shapes.

    Errors: NothingToTune; CalibrationFailed when the process that measures stops."""
    session = untuned(session)
    plan = with_kernels(session)
    lowered = driver.lower_plan(session, plan)
    groups = tuned_groups(lowered)
    if not groups:
        raise NothingToTune("no operators of this model become kernels")
    types = types_of(session.program.train)
    dtype = DTYPES[precision_of(session.program.train).compute]
    cases = [case_of(t.group, dtype, effort.tiles) for t in groups]
    with tempfile.TemporaryDirectory() as folder:
        driver.compile_plan(session, plan, Path(folder))
        for path in RUNTIME.glob("*.py"):  # eager operators are not in a program with kernels
            Path(folder, "runtime", path.name).write_text(path.read_text())
        results = measured(cases, effort, Path(folder), tell)
    pairs = zip(groups, results, strict=True)
    return [chosen(tuned, found, types.compute) for tuned, found in pairs]


def untuned(session: Session) -> Session:
    """As if nothing had been measured: what is slower fused is measured again, too."""
    program = session.program
    cluster = replace(program.cluster, kernels=None)
    return Session(replace(program, cluster=cluster), session.trust)


def with_kernels(session: Session) -> Plan:
    found = driver.find_plan(session)
    if isinstance(found, Infeasible):
        raise NothingToTune("no plan of this spec fits the memory: `llmspec plan` says more")
    return replace(found.plan, kernels="triton")


def measured(
    cases: list[dict[str, Any]], effort: Effort, folder: Path, tell: Tell
) -> list[dict[str, Any]]:
    task = {"seconds": effort.seconds, "cases": cases}
    (folder / "task.json").write_text(json.dumps(task))
    total = sum(map(measurements, cases))
    setting: Setting = setting_here("tuned", 1)
    command = ["llmspec.compiler.tune.worker", str(folder)]
    for done, what in enumerate(lines_of(setting, [command], alone=True)):
        tell(what, min(done + 1, total), total)
    found: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return found


def measurements(case: dict[str, Any]) -> int:
    """Lines that the worker prints of a case: the rule's tile, each other one, eager."""
    both = [case[word] for word in ("forward", "backward") if case[word] is not None]
    return 1 + sum(1 + len(one["tiles"]) + len(one["stages"]) for one in both)


def chosen(tuned: Tuned, found: dict[str, Any], width: int) -> TunedKernel:
    """Fused unless PyTorch's own operators take less time, both passes together."""
    moved = dict(zip(("forward", "backward"), moved_bytes(tuned.group, width), strict=True))
    passes = {word: _pass(moved[word], one) for word, one in found.items()}
    eager = [one["eager_s"] for one in found.values()]
    fused_s = sum(one["seconds"] for one in found.values())
    slower = None not in eager and sum(eager) < fused_s
    return TunedKernel(
        name=tuned.name,
        columns=tuned.group.columns,
        width=width,
        structure=tuned.structure,
        fused=not slower,
        forward=passes["forward"],
        backward=passes.get("backward"),
    )


def _pass(moved: int, one: dict[str, Any]) -> TunedPass:
    rows, columns, warps, stages = one["tile"]
    return TunedPass(
        rows=rows,
        columns=columns,
        warps=warps,
        stages=stages,
        rate=moved / one["seconds"],
        by_rule=moved / one["rule_s"],
        eager=moved / one["eager_s"] if one["eager_s"] else None,
    )
