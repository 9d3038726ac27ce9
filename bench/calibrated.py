"""Predicted beside measured on this machine: `python -m bench.calibrated`.

Calibrates for two processes and for one, then trains small models under several plans against what
it wrote, as `llmspec train` does, and reads what each run says of itself at its end. Exit status 1
if a step or a peak of memory is further off than the bound.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
QUICKSTART = ROOT / "examples" / "quickstart.llmspec"
FILES = {1: "alone.llmspec", 2: "both.llmspec"}
"""What is calibrated, by the number of processes."""

SMALL = "llama(layers=4, width=192, heads=6, kv_heads=2, ffn=512, vocab=256, context=256)"
WIDE = "llama(layers=3, width=384, heads=6, kv_heads=6, ffn=1024, vocab=2048, context=256)"
GPT = "gpt2(layers=4, width=192, heads=6, vocab=2048, context=256)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """pins: of the plan; none: as the search finds it. model: "" is the quickstart."""

    name: str
    pins: str
    model: str = SMALL
    processes: int = 2
    batch: int = 8


PLAIN = "recompute = none"
CASES = (
    Case(name="quickstart, as found", pins="", model=""),
    Case(name="tensor 2", pins=f"tensor = 2; {PLAIN}"),
    Case(name="pipeline 2", pins=f"pipeline = 2; schedule = 1f1b; microbatch = 2; {PLAIN}"),
    Case(name="data 2, ZeRO 1", pins=f"data = 2; zero = 1; microbatch = 2; {PLAIN}"),
    Case(name="data 2, ZeRO 3", pins=f"data = 2; zero = 3; microbatch = 4; {PLAIN}"),
    Case(name="one process", pins=f"microbatch = 8; {PLAIN}", processes=1),
    Case(name="wider, vocabulary of 2048", pins=f"data = 2; zero = 0; {PLAIN}", model=WIDE),
    Case(name="all computed again", pins="data = 2; zero = 0; recompute = full"),
    Case(name="gpt, data 2", pins=f"data = 2; zero = 0; {PLAIN}", model=GPT),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Seconds of a step and bytes of the fullest process."""

    case: str
    plan: str
    predicted_step_s: float
    measured_step_s: float
    predicted_memory_bytes: int
    measured_memory_bytes: int

    @property
    def errors(self) -> tuple[float, float]:
        """Of the predicted step and memory, as a share of what was measured."""
        return (
            self.predicted_step_s / self.measured_step_s - 1,
            self.predicted_memory_bytes / self.measured_memory_bytes - 1,
        )


def spec_text(case: Case, steps: int) -> str:
    file = FILES[case.processes]
    if not case.model:
        text = re.sub(
            r"^cluster laptop .*$", f'import "{file}"', QUICKSTART.read_text(), flags=re.M
        )
        text = re.sub(r"^( +cluster +=) laptop", rf"\1 {Path(file).stem}", text, flags=re.M)
        text = re.sub(r"^ +(validate|checkpoint) .*\n", "", text, flags=re.M)
        return re.sub(r"^( +steps +=) \d+", rf"\1 {steps}", text, flags=re.M).replace(
            "warmup(25)", "warmup(5)"
        )
    family = case.model.partition("(")[0]
    return f"""import {family}
import "{file}"
model m = {case.model}
train run {{
    model = m; cluster = {Path(file).stem}; dataset = text("{{stdlib}}/[a-r]*.py")
    batch = {case.batch} sequences; steps = {steps}; precision = fp32; log = every({steps})
    optimizer = adamw(lr=3e-3, weight_decay=0.1, clip=1.0); checkpoint = none
}}
plan {{ {case.pins} }}
"""


def llmspec(*words: str) -> None:
    """The command, with nothing of ours in its environment: it decides about threads."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "llmspec.compiler.cli", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llmspec {' '.join(words)}\n{done.stdout}{done.stderr}")


def measure(case: Case, steps: int, folder: Path) -> Result:
    spec, out = folder / "run.llmspec", folder / "program"
    spec.write_text(spec_text(case, steps))
    shutil.rmtree(out, ignore_errors=True)  # a checkpoint there would be gone on from
    llmspec("train", str(spec), "-o", str(out))
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    decided = json.loads((out / "plan.json").read_text())["predicted"]["plan"]
    words = ("data", "zero", "tensor", "pipeline", "microbatch", "recompute")
    return Result(
        case=case.name,
        plan=", ".join(f"{w} {decided[w]}" for w in words),
        **{k: v for k, v in last.items() if k != "step"},
    )


def table(results: list[Result], bound: float) -> str:
    lines = [
        "| plan | step predicted | measured | error | memory predicted | measured | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        step, memory = r.errors
        shown = [
            f"{1e3 * r.predicted_step_s:.0f} ms",
            f"{1e3 * r.measured_step_s:.0f} ms",
            f"{100 * step:+.1f} %",
            f"{r.predicted_memory_bytes / 2**20:.0f} MiB",
            f"{r.measured_memory_bytes / 2**20:.0f} MiB",
            f"{100 * memory:+.1f} %",
        ]
        mark = " (over)" if max(abs(step), abs(memory)) > bound else ""
        lines.append(f"| {r.case}{mark} | {' | '.join(shown)} |")
    return "\n".join(lines)


def page(results: list[Result], record: dict[str, object], bound: float) -> str:
    steps = [abs(r.errors[0]) for r in results]
    memories = [abs(r.errors[1]) for r in results]
    return (
        f"`python -m bench.calibrated` on {record['date']}: {record['cores']} cores, "
        f"{record['machine']}, torch {record['torch']}; load {record['load']:.1f} before it.\n\n"
        f"{table(results, bound)}\n\n"
        f"Median error {100 * statistics.median(steps):.1f} % of a step, "
        f"{100 * statistics.median(memories):.1f} % of memory; the worst "
        f"{100 * max(steps):.1f} % and {100 * max(memories):.1f} %.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="predicted beside measured on this machine")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--bound", type=float, default=0.15, help="of either error")
    parser.add_argument("--only", default="", help="cases whose names have this text")
    parser.add_argument("--keep", type=Path, help="a folder whose hardware files are used again")
    parser.add_argument("--out", type=Path, default=RESULTS / "calibrated.json")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if options.only in case.name]
    results = []
    record: dict[str, object] = {
        "date": str(date.today()),
        **{"torch": torch.__version__, "cores": os.cpu_count(), "machine": platform.machine()},
        "load": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for processes in sorted({case.processes for case in cases}):
            file = folder / FILES[processes]
            if not file.exists():
                start_s = time.perf_counter()
                llmspec("calibrate", str(file), "--processes", str(processes))
                record[f"calibration_{processes}_s"] = round(time.perf_counter() - start_s, 1)
        for case in cases:
            results.append(measure(case, options.steps, folder))
            print(table(results[-1:], options.bound).splitlines()[-1], file=sys.stderr, flush=True)
    text = page(results, record, options.bound)
    print(text)
    record |= {"bound": options.bound, "results": [asdict(r) for r in results]}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(text)
    return 0 if all(max(map(abs, r.errors)) <= options.bound for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
