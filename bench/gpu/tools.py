"""`llmspec calibrate` and `llmspec tune` on this device, in little time: that they work, and agree
with what was measured here otherwise.

`python -m bench.gpu.tools WHAT DEVICE NAME FOLDER`, each in a process of its own."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from bench.gpu.cases import Case, spec_text
from bench.gpu.measuring import Device
from bench.gpu.processes import Row, rows_of, say
from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.calibrate import cases as calibration
from llmspec.compiler.calibrate.file import text as hardware_text
from llmspec.compiler.calibrate.run import calibrate, setting_here
from llmspec.compiler.tune import run as tuning
from llmspec.compiler.tune.file import with_tuned

LONGEST_S, SHORTEST_S = 70.0, 15.0
SMALL = replace(calibration.GPU, seconds=0.01, model=(2, 1024, 8, 2816, 8192, 1024))
AGREES = (0.5, 2.0)
"""What calibration finds, to what this benchmark does."""


def check(
    case: Case, device: Device, name: str, folder: Path, left_s: Callable[[], float]
) -> Iterator[Row]:
    jobs = ["tune"] + ["calibrate"] * (device.kind == "cuda")
    for number, what in enumerate(jobs):
        own = folder / what
        own.mkdir(parents=True)
        seconds = min(LONGEST_S, left_s() / (len(jobs) - number))
        if seconds < SHORTEST_S:
            yield {"name": what, "failed": "no time left for it"}
            continue
        task = json.dumps({"case": asdict(case), "device": asdict(device), "name": name})
        seen = False
        for row in rows_of("bench.gpu.tools", [what, task, str(own)], seconds):
            seen = True
            yield {"name": what, "right": "failed" not in row, **row}
        if not seen:
            yield {"name": what, "right": False, "failed": "no word"}


def calibrated(device: Device, folder: Path) -> Iterator[Row]:
    """Measures little and briefly; the file checks, and its rates are those of this run."""
    start_s = time.perf_counter()
    found = calibrate(setting_here("here", 1, SMALL), lambda what, done, total: None)
    path = folder / "here.llmspec"
    path.write_text(hardware_text(found))
    ratios = {
        "copy_ratio": found.memory_bytes_per_s / device.bytes_per_s,
        "product_ratio": max(found.peaks.values()) / device.flops,
    }
    right = not dsl.check(path) and all(AGREES[0] <= r <= AGREES[1] for r in ratios.values())
    yield {"right": right, "took_s": time.perf_counter() - start_s, **ratios}


def tuned(case: Case, device: Device, name: str, folder: Path) -> Iterator[Row]:
    """Some tiles of each kernel; the program that is compiled with them then has them."""
    start_s = time.perf_counter()
    cuda = device.kind == "cuda"
    if not cuda:
        os.environ["TRITON_INTERPRET"] = "1"
    text = spec_text(
        case, name, precision="bf16" if cuda else "fp32", pins="recompute = none; kernels = triton"
    )
    spec = folder / "tuned.llmspec"
    spec.write_text(text)
    effort = tuning.Effort(seconds=0.01, tiles=4) if cuda else tuning.Effort(seconds=0.0, tiles=0)
    found = tuning.tune(driver.open_session(str(spec)), effort, lambda what, done, total: None)
    for kernel in found:
        one = kernel.forward
        gain = one.rate / one.by_rule if one.by_rule else 1.0
        use = "triton" if kernel.fused else "eager"
        tile = f"{one.rows} x {one.columns}"
        yield {"name": f"tune, {kernel.name}", "tile": tile, "warps": one.warps, "use": use} | {
            "gain": gain
        }
    fused = [replace(k, fused=True) for k in found]  # so that every tile is in the program
    spec.write_text(with_tuned(text, str(spec), "tuned", fused, []))
    session = driver.open_session(str(spec))
    program = driver.emit_plan(session, driver.find_plan(session).plan)["kernels.py"]  # type: ignore[union-attr]
    right = program.count("measured={") >= len(found) > 0
    yield {"name": "tune", "right": right, "took_s": time.perf_counter() - start_s}


def main(what: str, task: str, folder: str) -> None:
    given = json.loads(task)
    device = Device(**given["device"])
    if what == "calibrate":
        rows = calibrated(device, Path(folder))
    else:
        rows = tuned(Case.of(given["case"]), device, given["name"], Path(folder))
    for row in rows:
        say(row)


if __name__ == "__main__":
    main(*sys.argv[1:])
