"""An optimizer step of emitted programs on CPUs, against plain trainers: `python -m bench.step`.

The emitted program's own `main()` runs; after each of its steps the plain trainer does one in the
same process. A step's ratio is its time over the mean of the plain steps before and behind it, so
that what else the machine does falls on both. Exit status 1 if a median is over the bound.
"""

from __future__ import annotations

import argparse
import glob
import importlib
import json
import os
import platform
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bench.plain_trainers import PlainTrainer, Shape, plain_trainer

RESULTS = Path(__file__).parent / "results"
TEXT = "{stdlib}/[a-r]*.py"
WARM_UP = 3  # steps that are not counted

LLAMA = Shape(layers=4, width=192, heads=6, kv_heads=2, ffn=512, vocab=256, context=256)
GPT = Shape(layers=4, width=192, heads=6, kv_heads=6, ffn=768, vocab=2048, context=256)
DROPPING = replace(GPT, dropout=0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """parallel: of the plain trainer; pins: the plan that corresponds to it."""

    name: str
    model: str
    shape: Shape
    processes: int
    parallel: str
    pins: str
    batch: int = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Medians; seconds of one step. quartiles: of the ratios."""

    case: str
    steps: int
    emitted_s: float
    plain_s: float
    ratio: float
    quartiles: tuple[float, float]


PARALLEL = (
    ("1 process", 1, "alone", ""),
    ("2 processes, DDP", 2, "ddp", "data = 2; zero = 0; microbatch = 8"),
    ("2 processes, FSDP2", 2, "fsdp2", "data = 2; zero = 3; microbatch = 8"),
)
CASES = tuple(
    Case(name=f"{what}, {words}", model=model, shape=s, processes=n, parallel=kind, pins=pins)
    for what, model, s, ways in (
        ("llama", "llama", LLAMA, PARALLEL),
        ("gpt", "gpt", GPT, PARALLEL),
        ("gpt with dropout", "gpt", DROPPING, PARALLEL[:1]),
    )
    for words, n, kind, pins in ways
)


def spec_text(case: Case, steps: int) -> str:
    s = case.shape
    sizes = f"layers={s.layers}, width={s.width}, heads={s.heads}, vocab={s.vocab}"
    sizes += f", context={s.context}"
    if case.model == "llama":
        model = f"import llama\nmodel m = llama({sizes}, kv_heads={s.kv_heads}, ffn={s.ffn})"
    else:
        model = f"import gpt2\nmodel m = gpt2({sizes}, dropout={s.dropout})"
    return f"""{model}
cluster here {{ node = {case.processes} * cpu }}
train bench {{
    model = m; cluster = here; dataset = text("{TEXT}"); batch = {case.batch} sequences
    steps = {steps}; precision = fp32; seed = 1; log = every({steps})
    optimizer = adamw(lr=3e-3, weight_decay=0.1, clip=1.0); learning_rate = cosine(to=3e-4)
    checkpoint = every({steps})
}}
plan {{ {case.pins or "data = 1"}; recompute = none }}
"""


def emit(case: Case, steps: int, folder: Path) -> None:
    """The program of the case, into the folder."""
    from llmspec.compiler import driver  # the measured processes must not load the compiler
    from llmspec.compiler.search.search import Found

    spec = folder / "bench.llmspec"
    spec.write_text(spec_text(case, steps))
    session = driver.open_session(str(spec))
    found = driver.find_plan(session)
    assert isinstance(found, Found), f"no plan fits {case.name}"
    assert found.plan.mesh.world_size == case.processes, "the plan is of another size"
    driver.compile_plan(session, found.plan, folder / "program")


def text_data() -> np.ndarray:
    """The bytes that the emitted program trains on."""
    paths = sorted(glob.glob(TEXT.replace("{stdlib}", sysconfig.get_path("stdlib"))))
    return np.frombuffer(b"".join(Path(path).read_bytes() for path in paths), dtype=np.uint8)


@dataclass(slots=True)
class Interleaved:
    """Times of both programs' steps; `between` is called where the emitted program ends one."""

    plain: PlainTrainer
    wait: Callable[[], Any]
    emitted_s: list[float] = field(default_factory=list)
    plain_s: list[float] = field(default_factory=list)
    mark_s: float = 0.0

    def between(self) -> None:
        self.emitted_s.append(time.perf_counter() - self.mark_s)
        self.wait()
        start_s = time.perf_counter()
        self.plain.step()
        self.plain_s.append(time.perf_counter() - start_s)
        self.wait()
        self.mark_s = time.perf_counter()

    def ratios(self) -> list[float]:
        """Of each counted step to the mean of the plain ones around it."""
        return [
            2 * self.emitted_s[i] / (self.plain_s[i - 1] + self.plain_s[i])
            for i in range(WARM_UP, len(self.emitted_s))
        ]


@contextmanager
def hooked(metrics: Any, measured: Interleaved) -> Iterator[None]:
    """The emitted program's last act in a step is to record it."""
    record = metrics.step

    def step(self: Any, *values: Any, **options: Any) -> bool:
        stop = record(self, *values, **options)
        measured.between()
        return bool(stop)

    metrics.step = step
    yield
    metrics.step = record


def in_rank(rank: int, case: Case, folder: str, steps: int, threads: int) -> None:
    """One process of a case; rank 0 leaves the times of all ranks in the folder."""
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // case.processes))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case.processes)}
    store = dist.FileStore(os.path.join(folder, "store"), case.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=case.processes)
    os.chdir(folder)
    sys.path.insert(0, os.path.join(folder, "program"))
    program = importlib.import_module("train")
    plain = plain_trainer(
        case.model,
        case.shape,
        data=text_data(),
        batch=case.batch,
        steps=steps,
        parallel=case.parallel,
    )
    measured = Interleaved(plain, dist.barrier if case.processes > 1 else lambda: None)
    # closing ends the group that both programs share
    mesh_class = importlib.import_module("runtime.mesh").Mesh
    mesh_class.close = lambda self: None
    with hooked(importlib.import_module("runtime.metrics").Metrics, measured):
        program.main()
    if rank == 0:
        times = {"ratios": measured.ratios(), "emitted_s": measured.emitted_s}
        Path(folder, "times.json").write_text(json.dumps(times | {"plain_s": measured.plain_s}))
    dist.destroy_process_group()


def measure(case: Case, steps: int, threads: int) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        emit(case, steps, Path(folder))
        mp.spawn(in_rank, args=(case, folder, steps, threads), nprocs=case.processes)
        times = json.loads(Path(folder, "times.json").read_text())
    low, _, high = statistics.quantiles(times["ratios"], n=4)
    return Result(
        case=case.name,
        steps=len(times["ratios"]),
        emitted_s=statistics.median(times["emitted_s"][WARM_UP:]),
        plain_s=statistics.median(times["plain_s"][WARM_UP:]),
        ratio=statistics.median(times["ratios"]),
        quartiles=(low, high),
    )


def table(results: list[Result], bound: float) -> str:
    width = max(len(r.case) for r in results)
    lines = [f"{'':<{width}}   emitted     plain   ratio   quartiles"]
    for r in results:
        low, high = r.quartiles
        mark = "" if r.ratio <= bound else f"   over {bound:.2f}"
        lines.append(
            f"{r.case:<{width}}  {1e3 * r.emitted_s:5.1f} ms  {1e3 * r.plain_s:5.1f} ms"
            f"   {r.ratio:.3f}   {low:.3f} {high:.3f}{mark}"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    return {"torch": torch.__version__, "cores": os.cpu_count(), "machine": platform.machine()}


def tiny(case: Case) -> Case:
    """The same case in milliseconds: to test the benchmark, not the programs."""
    small = replace(case.shape, layers=2, width=32, heads=4, kv_heads=2, ffn=64, context=16)
    return replace(case, shape=replace(small, vocab=256), pins=case.pins.replace("8", "4"), batch=8)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="steps of emitted programs against plain trainers")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bound", type=float, default=1.05, help="of the median ratio")
    parser.add_argument("--threads", type=int, default=0, help="of a process; 0: its cores' share")
    parser.add_argument("--only", default="", help="cases whose names have this text")
    parser.add_argument("--tiny", action="store_true", help="sizes that test the benchmark itself")
    parser.add_argument("--out", type=Path, default=RESULTS / "step.json")
    options = parser.parse_args(arguments)
    cases = [tiny(c) if options.tiny else c for c in CASES if options.only in c.name]
    results = []
    for case in cases:
        results.append(measure(case, options.steps, options.threads))
        print(table(results[-1:], options.bound).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(results, options.bound))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"bound": options.bound, **machine(), "results": [asdict(r) for r in results]}
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(r.ratio <= options.bound for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
