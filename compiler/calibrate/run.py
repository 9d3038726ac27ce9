"""A calibration from beginning to end: processes that measure, a fit, a program, a file's text."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch

from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.calibrate import cases, fit
from llmspec.compiler.calibrate.cases import Effort
from llmspec.compiler.calibrate.file import Hardware, text
from llmspec.compiler.cost.hardware import CPU_CONSTANTS, Machine, machine_of
from llmspec.compiler.cost.types import Types, types_of
from llmspec.compiler.driver import Session
from llmspec.compiler.emit.package import RUNTIME
from llmspec.compiler.search.search import Found

Tell = Callable[[str, int, int], None]
"""Told (what is being measured, how many measurements are done, of how many)."""
USABLE = 0.9
"""Of the machine's memory: the rest is the system's."""
PROGRAM = "a program"


class CalibrationFailed(Exception):
    """A process stopped; the message is what it said last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """name: of the device and the cluster. processes: how many measure together.

    dtypes: whose products are measured, PyTorch's name by the language's; trains: the one of them
    that models are measured in.
    """

    name: str
    processes: int
    effort: Effort
    gpu: bool
    dtypes: dict[str, str]
    trains: str

    @property
    def kind(self) -> str:
        return "gpu" if self.gpu else "cpu"

    @property
    def threads(self) -> int:
        """Of one CPU process, as `llmspec train` gives them."""
        return max(1, (os.cpu_count() or 1) // self.processes)


def setting_here(name: str, processes: int | None = None, effort: Effort | None = None) -> Setting:
    """What there is: every GPU, or two processes on the CPU."""
    if not torch.cuda.is_available():
        return Setting(
            name=name,
            processes=processes or min(2, os.cpu_count() or 1),
            effort=effort or cases.CPU,
            gpu=False,
            dtypes={"fp32": "float32"},
            trains="fp32",
        )
    recent = torch.cuda.get_device_capability() >= (8, 0)
    short = "bf16" if recent else "fp16"
    dtypes = {"fp32": "float32"} | ({"tf32": "float32"} if recent else {})
    return Setting(
        name=name,
        processes=processes or torch.cuda.device_count(),
        effort=effort or cases.GPU,
        gpu=True,
        dtypes=dtypes | {short: "bfloat16" if recent else "float16"},
        trains=short,
    )


def calibrate(setting: Setting, tell: Tell) -> Hardware:
    """Errors: CalibrationFailed when a process does not end well."""
    effort = setting.effort
    operators = cases.operators(effort, setting.dtypes[setting.trains])
    task = cases.task(
        effort,
        gpu=setting.gpu,
        world=setting.processes,
        dtypes=setting.dtypes,
        trains=setting.trains,
    )
    task["operators"] = operators.units
    with tempfile.TemporaryDirectory() as folder:
        results = measured(setting, task, len(operators.measured), Path(folder), tell)
        found = fitted(setting, results, operators)
        return with_program(setting, found, Path(folder), tell)


# --------------------------------------------------------------------------------------------------
# Processes


def measured(
    setting: Setting, task: dict[str, Any], operators: int, folder: Path, tell: Tell
) -> fit.Results:
    runtime = folder / "runtime"
    runtime.mkdir()
    for path in RUNTIME.glob("*.py"):
        (runtime / path.name).write_text(path.read_text())
    (folder / "task.json").write_text(json.dumps(task))
    total = operators + sum(len(v) for k, v in task.items() if k not in ("seconds", "operators"))
    commands = [["llmspec.compiler.calibrate.worker", str(folder)]] * setting.processes
    for done, what in enumerate(lines_of(setting, commands, alone=False)):
        tell(what, done + 1, total + 1)
    return [json.loads((folder / f"rank{r}.json").read_text()) for r in range(setting.processes)]


def lines_of(setting: Setting, commands: list[list[str]], *, alone: bool) -> Iterator[str]:
    """Run one module a process, all at once; what the first one prints, line by line.

    alone: each believes that it is the only one."""
    with ExitStack() as stack:
        started = []
        for rank, command in enumerate(commands):
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env=environment(setting, rank, alone=alone),
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=errors,
                text=True,
            )
            stack.callback(stop, process)
            started.append((process, errors))
        out = started[0][0].stdout
        assert out is not None, "the first process has a pipe"
        stack.enter_context(out)
        for line in out:
            yield line.strip()
        for process, errors in started:
            if process.wait():
                errors.seek(0)
                raise CalibrationFailed(errors.read().strip() or f"status {process.returncode}")


def stop(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


def environment(setting: Setting, rank: int, *, alone: bool) -> dict[str, str]:
    world = 1 if alone else setting.processes
    own = {"RANK": str(0 if alone else rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    if not setting.gpu:
        own["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(setting.threads))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "TORCHELASTIC_"))}
    return kept | own


# --------------------------------------------------------------------------------------------------
# The fit


def fitted(setting: Setting, results: fit.Results, operators: cases.Operators) -> Hardware:
    rates = fit.rates(results, setting.trains)
    found = bare(setting, results, rates)
    machine, types = machine_and_types(setting, found)
    efficiency = fit.attention_efficiency(results, operators, machine)
    found = replace(found, attention_efficiency=efficiency)
    machine, types = machine_and_types(setting, found)
    factors = fit.operator_factors(results, operators, machine, types.compute)
    factors["update"] = fit.update_factors(results, types, machine)
    found = replace(found, operators=factors)
    if setting.processes > 1:
        unit = replace(
            machine, link_bytes_per_s=1.0, link_latency_s=1.0, devices_per_node=setting.processes
        )
        link = fit.link(results, setting.processes, unit)
        found = replace(
            found,
            link_bytes_per_s=link.bytes_per_s,
            link_latency_s=link.latency_s,
            collectives=link.collectives,
        )
        machine, types = machine_and_types(setting, found, devices=setting.processes)
        factors["weight"] = fit.weight_factors(results, machine)
        factors["unit"] = fit.unit_factors(results, machine, setting.processes)
    if setting.gpu:
        (copy,) = fit.mean_of(results, "copies")
        found = replace(found, host_link_bytes_per_s=copy["bytes"] / copy["seconds"])
    return found


def bare(setting: Setting, results: fit.Results, rates: fit.Rates) -> Hardware:
    """With the rates, and nothing that is measured against them."""
    device, host = results[0]["device"], host_memory_bytes()
    if setting.gpu:
        memory, usable = device["memory_bytes"], device["memory_bytes"]
        fixed = max(one["device"]["fixed_bytes"] for one in results)
    else:
        memory = host // setting.processes
        usable, fixed = int(USABLE * memory), int(CPU_CONSTANTS["fixed_bytes"])
    return Hardware(
        name=setting.name,
        kind=setting.kind,
        what=in_words(setting, device),
        devices=setting.processes,
        memory_bytes=memory,
        usable_bytes=usable,
        memory_bytes_per_s=rates.memory_bytes_per_s,
        host_memory_bytes=int(USABLE * host) if setting.gpu else usable * setting.processes,
        peaks=rates.peaks,
        launch_s=rates.launch_s,
        fixed_bytes=fixed,
        multiprocessors=device["multiprocessors"],
        matmul_efficiency=rates.matmul_efficiency,
    )


def in_words(setting: Setting, device: dict[str, Any]) -> tuple[str, ...]:
    threads = device.get("threads", 0)
    what = f"{setting.processes} × {device['name']}"
    if not setting.gpu:
        count = "1 thread" if threads == 1 else f"{threads} threads"
        each = "1 process" if setting.processes == 1 else f"{setting.processes} processes"
        what = f"{each} of {count}, {os.cpu_count()} cores, {platform.machine()}"
    lines = (
        f"Measured by `llmspec calibrate` on {date.today()}: {what}; torch {torch.__version__}.",
        f"Operators in {setting.trains}. Where it is imported, `cluster = {setting.name}` trains.",
    )
    if setting.gpu:
        return lines
    return (*lines, "For another number of processes or threads, calibrate again.")


def host_memory_bytes() -> int:
    """Of the machine, or of the container that this is."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and limit.read_text().strip().isdigit():
        size = min(size, int(limit.read_text()))
    return size


def spec_text(setting: Setting, found: Hardware, *, devices: int) -> str:
    """The hardware file, and a model on it."""
    effort = setting.effort
    return (
        text(replace(found, devices=devices))
        + cases.model_text("llama", effort.model)
        + f"train program {{\n model = m; cluster = {found.name}; dataset = synthetic\n"
        + f" batch = {effort.sequences * devices} sequences; steps = {effort.steps}\n"
        + f" precision = {setting.trains}; checkpoint = none; log = every({effort.steps})\n}}\n"
        + "plan { recompute = none; offload = none }\n"
    )


def machine_and_types(setting: Setting, found: Hardware, devices: int = 1) -> tuple[Machine, Types]:
    loaded = dsl.load("calibrate.llmspec", text=spec_text(setting, found, devices=devices))
    types = types_of(loaded.train)
    return machine_of(loaded.cluster, types), types


# --------------------------------------------------------------------------------------------------
# A whole program on every device, each by itself


def with_program(setting: Setting, found: Hardware, folder: Path, tell: Tell) -> Hardware:
    """What a program keeps of its operators' rates, and on a CPU what it takes beside tensors."""
    loaded = dsl.load("calibrate.llmspec", text=spec_text(setting, found, devices=1))
    session = Session(loaded)
    plan = driver.find_plan(session)
    if not isinstance(plan, Found):
        raise CalibrationFailed("the memory here is too small for the program that is measured")
    folders = [folder / f"program{rank}" for rank in range(setting.processes)]
    for own in folders:
        driver.compile_plan(session, plan.plan, own)
    tell(PROGRAM, 0, 0)
    commands = [["llmspec.compiler.calibrate.program", str(own)] for own in folders]
    for _ in lines_of(setting, commands, alone=True):
        pass
    last = [json.loads((f / "log.jsonl").read_text().splitlines()[-1]) for f in folders]
    measured_s = sum(one["measured_step_s"] for one in last) / len(last)
    predicted = plan.plan.predicted["predicted"]
    found = replace(found, sustained=fit.sustained(predicted["time_s"], measured_s))
    if setting.gpu:
        return found
    tensors = predicted["peak_memory_bytes"] - predicted["memory_bytes"]["fixed"]
    fixed = max(one["measured_memory_bytes"] for one in last) - tensors
    return replace(found, fixed_bytes=max(fixed, 2**20))
