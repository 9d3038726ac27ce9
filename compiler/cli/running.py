"""Verbs that run what was emitted: verify, dryrun, train."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from llmspec.compiler import driver
from llmspec.compiler.cli.console import DIAGNOSTICS, OK, fault, product, product_json, status
from llmspec.compiler.cli.planning import of_a_plan
from llmspec.compiler.driver import Session
from llmspec.compiler.dryrun.run import WITHIN, Difference, Role, RoleFailed, dry_run
from llmspec.compiler.plan import Plan
from llmspec.compiler.text import in_bytes
from llmspec.compiler.verify.compare import Report
from llmspec.compiler.verify.plan import verify_plan
from llmspec.compiler.verify.run import ProcessFailed
from llmspec.dsl.program import DeviceKind, Program


@of_a_plan
def verify(options: Namespace, session: Session, plan: Plan) -> int:
    status("Verifying", f"{options.spec}, shrunken, on local processes")
    try:
        report, small = verify_plan(session, plan)
    except ProcessFailed as error:
        status("Failed", "a process of the emitted program stopped")
        product(str(error))
        return DIAGNOSTICS
    if options.json:
        product_json(report_json(report))
    else:
        product(render_report(report, plan.mesh.world_size, small.mesh.world_size))
    return OK if report.ok else DIAGNOSTICS


def report_json(report: Report) -> dict[str, object]:
    return {
        "schema": 1,
        "ok": report.ok,
        "compared": len(report.differences),
        "worst": {"what": report.worst.what, "share_of_allowed": report.worst.error},
        "failures": [{"what": d.what, "share_of_allowed": d.error} for d in report.failures()],
    }


def render_report(report: Report, planned: int, ran: int) -> str:
    worst = report.worst
    if report.ok:
        return (
            f"verified: {len(report.differences)} quantities equal those of one device in float64\n"
            f"  on {ran} processes, the plan's {planned} shrunken\n"
            f"  closest to its bound: {worst.what}, {worst.error:.2g} of what is allowed"
        )
    lines = [
        f"  {d.what}: {d.error:.3g} times what is allowed"
        for d in sorted(report.failures(), key=lambda d: -d.error)[:40]
    ]
    more = len(report.failures()) - len(lines)
    tail = [f"  … and {more} more"] if more > 0 else []
    return "\n".join([f"{len(report.failures())} quantities differ", *lines, *tail])


@of_a_plan
def dryrun(options: Namespace, session: Session, plan: Plan) -> int:
    """Whether the program does what the plan says: every collective, and each peak within 1 %."""
    status("Running", f"the program of {options.spec} at full size, on fake tensors")
    try:
        roles = dry_run(session, plan)
    except RoleFailed as error:
        status("Failed", "a process of the emitted program stopped")
        product(str(error))
        return DIAGNOSTICS
    if options.json:
        product_json({"schema": 1, "roles": [role_json(role) for role in roles]})
    else:
        product("\n".join(line for role in roles for line in role_lines(role)))
    different = sum(not role.agrees for role in roles)
    if different:
        status("Failed", f"{different} of {len(roles)} pipeline ranks do not do what the plan says")
    return DIAGNOSTICS if different else OK


SHOWN = 8
"""Lines of what a differing peak is made of, and places of a differing collective."""


def role_json(role: Role) -> dict[str, object]:
    names = ("kind", "ranks", "bytes", "count")
    return {
        "pipeline_rank": role.pipeline_rank,
        "agrees": role.agrees,
        "peak_bytes": role.peak_bytes,
        "peak_at": role.peak_at,
        "peak_place": role.peak_place,
        "at_peak": [
            {
                "operator": one.operator,
                "place": one.place,
                "dtype": one.dtype,
                "shape": list(one.shape),
                "bytes": one.size_bytes,
            }
            for one in role.at_peak
        ],
        "resting_bytes": role.resting_bytes,
        "predicted_bytes": role.predicted_bytes,
        "error": role.error,
        "microbatches_counted": role.counted,
        "collectives": [dict(zip(names, one, strict=True)) for one in role.collectives],
        "differing": [
            {
                "kind": one.kind,
                "ranks": one.ranks,
                "bytes": one.size_bytes,
                "planned": one.planned,
                "executed": one.executed,
                "places": list(one.places),
                "units": list(one.units),
            }
            for one in role.differing
        ],
    }


def role_lines(role: Role) -> list[str]:
    lines = [
        f"pipeline rank {role.pipeline_rank}: {in_bytes(role.peak_bytes)} of live tensors at the "
        f"peak, predicted {in_bytes(role.predicted_bytes)} ({100 * role.error:+.1f} %)",
        f"  reached by {role.peak_at} in {role.peak_place}",
    ]
    if role.counted:
        lines.append(
            f"  {role.counted} micro-batches were counted like the ones before them, not run"
        )
    for kind, ranks, size, count in role.collectives:
        lines.append(f"  {kind:14} {in_bytes(size):>10} over {ranks} ranks, {count} times")
    if not role.differing:
        lines.append("  every collective is the plan's")
    for one in role.differing:
        lines += _difference_lines(one)
    if abs(role.error) > WITHIN:
        lines.append("  differs: the peak; the largest tensors alive then, by what made them")
        lines += [
            f"    {in_bytes(one.size_bytes):>10}  {one.operator} {one.dtype}{list(one.shape)} "
            f"in {one.place}"
            for one in role.at_peak[:SHOWN]
        ]
    return lines


def _difference_lines(one: Difference) -> list[str]:
    planned = f" of {' and '.join(f'`{unit}`' for unit in one.units)}" if one.units else ""
    head = (
        f"  differs: {one.kind} of {one.size_bytes:,} bytes over {one.ranks} ranks, "
        f"{one.planned} times in the plan{planned}, {one.executed} executed"
    )
    return [head, *(f"    in {place}" for place in one.places[:SHOWN])]


# --------------------------------------------------------------------------------------------------


@of_a_plan
def train(options: Namespace, session: Session, plan: Plan) -> int:
    missing = not_here(session.program, plan)
    if missing:
        return fault(missing, *what_works_here(options.spec))
    folder = Path(options.out) if options.out else driver.default_folder(session.program)
    driver.compile_plan(session, plan, folder)
    status("Emitted", str(folder))
    code = torchrun(session.program, plan, folder, quiet=options.json)
    left = {
        "plan": f"{folder / 'plan.json'}",
        "program": f"{folder / 'train.py'}",
        "checkpoint": newest_checkpoint(folder),
    }
    if options.json:
        product_json({"schema": 1, "exit_status": code, **left})
    elif code == 0:
        for what, where in left.items():
            status(what.capitalize(), where or "none: the spec asks for no checkpoints")
    return code


def not_here(program: Program, plan: Plan) -> str | None:
    """What this machine lacks for the plan; None when it can run it."""
    import torch

    world = plan.mesh.world_size
    if program.cluster.device.kind is DeviceKind.CPU:
        return None if program.cluster.nodes == 1 else "the plan needs several machines"
    have = torch.cuda.device_count()
    if have >= world:
        return None
    gpus = "no GPU" if have == 0 else "one GPU" if have == 1 else f"{have} GPUs"
    return f"the plan needs {world} × {program.cluster.device.name}; this machine has {gpus}"


def what_works_here(spec: str) -> tuple[str, ...]:
    return (
        f"llmspec verify {spec}    the same decisions, shrunken, on local processes",
        f"llmspec compile {spec}   emit it, with launch.sh, launch.sbatch and launch.yaml",
        "a cluster of `node = 2 * cpu` and a smaller model train here",
    )


def torchrun(program: Program, plan: Plan, folder: Path, *, quiet: bool) -> int:
    """Run the program under torchrun from the spec's folder; its exit status.

    quiet: its progress goes to stderr, so that stdout holds data alone.

    Ctrl-C reaches torchrun and all its processes, which save a checkpoint and end.
    """
    environment = dict(os.environ)
    if program.cluster.device.kind is DeviceKind.CPU:
        cores = max(1, (os.cpu_count() or 1) // plan.mesh.world_size)
        environment.setdefault("OMP_NUM_THREADS", str(cores))
    command = [sys.executable, "-m", "llmspec.compiler.cli.launcher", "--standalone"]
    command += ["--nproc-per-node", str(plan.mesh.world_size), str((folder / "train.py").resolve())]
    process = subprocess.Popen(
        command, cwd=program.folder or ".", env=environment, stdout=sys.stderr if quiet else None
    )
    try:
        return process.wait()
    except KeyboardInterrupt:
        return after_interrupt(process)


def after_interrupt(process: subprocess.Popen[bytes]) -> int:
    """The terminal has told the whole process group; give it time to save."""
    status("Stopping", "saving a checkpoint (Ctrl-C again stops at once)")
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGTERM)
        return process.wait()


def newest_checkpoint(folder: Path) -> str | None:
    found = sorted((folder / "checkpoints").glob("step_*[0-9]"))
    return str(found[-1]) if found else None
