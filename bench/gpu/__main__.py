"""`python -m bench.gpu`: all that only a GPU can tell, in one run; bench/METHOD.md says how.

Every measurement is in a process of its own; this one only starts them, and writes the results down
after each. Exit status 1 if a kernel, the loss, a program or a tool is not right.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.gpu import landed, tools, training
from bench.gpu.cases import CASES, Case, tiny
from bench.gpu.emitted_kernels import emitted_kernels
from bench.gpu.emitting import language_name
from bench.gpu.kernels import words_of
from bench.gpu.measuring import Device
from bench.gpu.page import page
from bench.gpu.processes import Row, rows_of

RESULTS = Path(__file__).parents[1] / "results"
LIMIT_S = 520.0
SHARES = {"loss": 0.08, "kernels": 0.22, "training": 0.82, "landed": 0.92, "tools": 1.0}
"""By when of the whole time a section ends; what one does not need, the next ones have."""
CHECKED = ("loss", "kernels", "landed", "tools")


@dataclass
class Run:
    """out: where the results go. seconds: that all of it may take."""

    out: Path
    seconds: float
    small: bool
    start_s: float = field(default_factory=time.perf_counter)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def passed_s(self) -> float:
        return time.perf_counter() - self.start_s

    def left_s(self, share: float) -> Callable[[], float]:
        return lambda: share * self.seconds - self.passed_s

    def section(self, name: str, rows: Iterator[Row]) -> None:
        """Its rows as they come; what goes wrong is a row, too."""
        found: list[Row] = self.results.setdefault(name, [])
        try:
            for row in rows:
                add(found, row)
                self.write()
        except Exception as error:  # of any kind: the other sections are still to be run
            found.append({"name": name, "who": name, "right": False, "failed": words_of(error)})
        print(f"{name}: {self.passed_s:.0f} s", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> str:
        self.results["seconds"] = self.passed_s
        training.ratios(self.results.get("training", []))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.results, indent=1) + "\n")
        text = page(self.results)
        self.out.with_suffix(".md").write_text(text)
        return text


def add(found: list[Row], row: Row) -> None:
    """In the place of one that says less of the same."""
    key = [row.get(k) for k in ("case", "name", "who")]
    for i, other in enumerate(found):
        if [other.get(k) for k in ("case", "name", "who")] == key:
            found[i] = row
            return
    found.append(row)


def sections(run: Run, device: Device, name: str, folder: Path) -> dict[str, Iterator[Row]]:
    small = ["tiny"] * run.small
    cases = [tiny(c) for c in CASES if not c.fit] if run.small else list(CASES)
    model = tiny(landed.MODEL) if run.small else landed.MODEL
    left = {section: run.left_s(share) for section, share in SHARES.items()}
    description = json.dumps(asdict(device))
    # the kernels of a model's blocks are the same however many there are
    few = [c for c in cases if not c.fit]
    cuda = device.kind == "cuda"
    return {
        "loss": loss(description, small, left["loss"]),
        "kernels": emitted_kernels(few, device, name, folder / "kernels", left["kernels"]),
        "training": trained(cases, device, name, folder / "training", left["training"]),
        "landed": landed.check(name, folder / "landed", left["landed"], cuda=cuda, case=model),
        "tools": tools.check(model, device, name, folder / "tools", left["tools"]),
    }


def loss(device: str, small: list[str], left_s: Callable[[], float]) -> Iterator[Row]:
    for row in rows_of("bench.gpu.kernels", [device, *small], left_s()):
        yield row if "name" in row else {"name": "loss", "right": False, **row}


def trained(
    cases: list[Case], device: Device, name: str, folder: Path, left_s: Callable[[], float]
) -> Iterator[Row]:
    """Each case has its share of what is left; one that fails leaves the others."""
    for number, case in enumerate(cases):
        begun_s, until_s = time.perf_counter(), left_s() / (len(cases) - number)

        def own_left_s(begun_s: float = begun_s, until_s: float = until_s) -> float:
            return until_s - (time.perf_counter() - begun_s)

        try:
            yield from training.train(case, device, name, folder, own_left_s)
        except Exception as error:  # of any kind: the other models are still to be trained
            yield {"case": case.name, "who": "emitting", "failed": words_of(error)}


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def this_device(small: bool) -> Device:
    first, *_ = rows_of("bench.gpu.measuring", ["tiny"] * small, 120.0)
    if "failed" in first:
        raise SystemExit(f"this device cannot be measured: {first['failed']}")
    return Device(**first)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="what a GPU does with emitted programs")
    parser.add_argument("--only", default="", help="sections, with commas between them")
    parser.add_argument("--gpu", help="what the language calls the device")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for all of it")
    parser.add_argument("--tiny", action="store_true", help="sizes that test the benchmark itself")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args(arguments)
    run = Run(options.out, options.limit, options.tiny)
    device = this_device(options.tiny)
    name = f'gpu("{options.gpu}")' if options.gpu else language_name(device)
    packages = ("torch", "triton", "transformers", "liger-kernel")
    run.results |= {p: found for p in packages if (found := installed(p))}
    run.results["device"] = asdict(device)
    with tempfile.TemporaryDirectory() as folder:
        every = sections(run, device, name, Path(folder))
        for section in options.only.split(",") if options.only else every:
            run.section(section, every[section])
    print(run.write())
    checked = [row for s in CHECKED for row in run.results.get(s, ())]
    return 0 if all(row.get("right", True) for row in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
