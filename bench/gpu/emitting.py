"""From a spec's text to a program on disk, and what its plan predicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.gpu.measuring import Device
from llmspec.compiler import driver
from llmspec.compiler.cost.hardware import machine_of
from llmspec.compiler.cost.types import types_of
from llmspec.compiler.search.search import Infeasible
from llmspec.dsl.hardware import normal, spelled_names


def emit(
    text: str, folder: Path, *, kernels: str | None = None, write: bool = True
) -> dict[str, Any]:
    """The program, in `folder/program`. `kernels`: in place of what the plan says. write: False:
    only the plan is asked for.

    Returns `fits`, and where it does `kernels`, `peak_flops` and the plan's predictions."""
    spec = folder / "bench.llmspec"
    spec.write_text(text)
    session = driver.open_session(str(spec))
    found = driver.find_plan(session)
    if isinstance(found, Infeasible):
        return {"fits": False}
    plan = found.plan if kernels is None else replace(found.plan, kernels=kernels)
    if write:
        driver.compile_plan(session, plan, folder / "program")
    peak_flops = machine_of(session.program.cluster, types_of(session.program.train)).peak_flops
    return {"fits": True, "kernels": plan.kernels, "peak_flops": peak_flops, **plan.predicted}


def language_name(device: Device) -> str:
    """What the language calls the device: the library's longest name that is part of its own.

    Errors: SystemExit when the library has none."""
    if device.kind == "cpu":
        return "cpu"
    own = normal(device.name)
    fitting = [name for name in spelled_names() if normal(name) in own]
    if not fitting:
        raise SystemExit(f"the library has no {device.name}: say which is like it, --gpu NAME")
    return f'gpu("{max(fitting, key=len)}")'
