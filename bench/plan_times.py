"""How long a cold `llmspec plan` takes for the examples: `python -m bench.plan_times`.

Each runs in a process of its own, one after the other, with one thread. Seconds of the processor
(user and system) say how much work it is; those of the clock also what else the machine does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
SPECS = (
    "gpt2_small",
    "llama3_8b",
    "llama3_8b_long",
    "llama3_70b",
    "llama3_405b",
    "gpt_1t",
    "mixtral_8x7b",
    "deepseek_v3",
)
SEARCHED = re.compile(r"Searched ([\d,]+) plans,.*?([\d,]+) fit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One spec. plans, fit: how many had a price, and of those how many fit; None when the command
    did not end in time."""

    spec: str
    wall_s: float
    user_s: float
    system_s: float
    plans: int | None
    fit: int | None
    winner: str


def measure(spec: str, limit_s: float) -> Run:
    command = [sys.executable, "-m", "llmspec.compiler.cli", "plan", f"examples/{spec}.llmspec"]
    start, before = time.perf_counter(), os.times()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, status = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, status = process.communicate()
    after, stop = os.times(), time.perf_counter()
    found = SEARCHED.search(status)
    first = out.splitlines()[0] if found else "not done"
    return Run(
        spec=spec,
        wall_s=round(stop - start, 1),
        user_s=round(after.children_user - before.children_user, 1),
        system_s=round(after.children_system - before.children_system, 1),
        plans=int(found[1].replace(",", "")) if found else None,
        fit=int(found[2].replace(",", "")) if found else None,
        winner=first,
    )


def table(runs: list[Run], machine: str, date: str) -> str:
    lines = [
        "# Cold times of `llmspec plan`",
        "",
        f"{date}, {machine}, one thread each: `python -m bench.plan_times`.",
        "",
        "| spec | processor s | clock s | plans priced | fit | plan |",
        "|---|---|---|---|---|---|",
    ]
    for r in runs:
        spent = f"{r.user_s + r.system_s:.1f}"
        plans, fit = ("-" if n is None else n for n in (r.plans, r.fit))
        lines.append(f"| {r.spec} | {spent} | {r.wall_s:.1f} | {plans} | {fit} | {r.winner} |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    options.add_argument("--only", default="", help="specs whose names have this text")
    options.add_argument("--limit", type=float, default=600.0, help="seconds for each")
    chosen = options.parse_args()
    runs = []
    for spec in SPECS:
        if chosen.only in spec:
            runs.append(measure(spec, chosen.limit))
            print(f"{spec:16} {runs[-1].user_s + runs[-1].system_s:6.1f} s", flush=True)
    load = f"load {os.getloadavg()[0]:.1f}"
    machine, date = f"{processor()}, {load}", datetime.date.today().isoformat()
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "plan_times.md").write_text(table(runs, machine, date))
    found = {"date": date, "machine": machine, "runs": [asdict(r) for r in runs]}
    (RESULTS / "plan_times.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(r.plans is not None for r in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
