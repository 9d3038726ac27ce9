"""Specs of seconds, compiled; and their emitted programs, run in forked ranks or under torchrun."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmspec.compiler import driver
from llmspec.compiler.search.search import Found
from tests import processes

LLAMA = """import llama
model m = llama(layers=4, width=32, heads=4, kv_heads=2, ffn=64, vocab=256, context=16)
"""

GPT = """import gpt2
model m = gpt2(layers=4, width=32, heads=4, vocab=257, context=16, dropout=0.1)
"""

PATIENCE_S = 120
ROOT = Path(__file__).resolve().parents[2]


def spec_text(model: str, ranks: int, pins: str = "", *, steps: int = 8, more: str = "") -> str:
    return f"""{model}
cluster laptop {{ node = {ranks} * cpu }}
train run {{
    model = m; cluster = laptop; dataset = text("data.txt"); batch = 8 sequences
    steps = {steps}; precision = fp32; seed = 3
    optimizer = adamw(lr=3e-3, clip=1.0); learning_rate = warmup(2) then cosine(to=3e-4)
    {more}
}}
plan {{ {pins} }}
"""


def write_data(folder: Path) -> None:
    """About 4,000 samples of 16 tokens: no sample comes twice in these runs."""
    (folder / "data.txt").write_bytes(Path(__file__).read_bytes() * 12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitted:
    """world: how many processes the plan wants."""

    spec: Path
    folder: Path
    world: int
    files: dict[str, str]

    def log(self) -> list[dict[str, float]]:
        """Every line but `measured`, without what a clock says."""
        rows = [row for row in self._rows() if "measured_step_s" not in row]
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    def measured(self) -> dict[str, float]:
        """The last line of a run that has ended."""
        return self._rows()[-1]

    def _rows(self) -> list[dict[str, float]]:
        lines = (self.folder / "log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.log() if "loss" in row]

    def forget(self) -> None:
        """As if it had never run."""
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        (self.folder / "log.jsonl").unlink(missing_ok=True)

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step_*"))


def compile_text(text: str, spec: Path, folder: Path) -> Emitted:
    """Write the spec, search, emit."""
    spec.parent.mkdir(parents=True, exist_ok=True)
    spec.write_text(text)
    session = driver.open_session(str(spec))
    found = driver.find_plan(session)
    assert isinstance(found, Found), f"no plan fits: {found}"
    files = driver.compile_plan(session, found.plan, folder)
    return Emitted(spec=spec, folder=folder, world=found.plan.mesh.world_size, files=files)


def ruff_says(folder: Path) -> str:
    """What it has against an emitted directory, in lint or in format."""
    rules = ["--select", "E,F,I,B,UP", "--target-version", "py311"]
    alone = ["--isolated", "--line-length", "100"]
    lint = _says(folder, "ruff", "check", *alone, *rules, ".")
    return lint + _says(folder, "ruff", "format", "--check", *alone, ".")


def mypy_says(folder: Path) -> str:
    # the project's own cache knows torch already, and takes a minute to make
    options = ["--check-untyped-defs", "--ignore-missing-imports", "--python-version", "3.11"]
    options += ["--cache-dir", str(ROOT / ".mypy_cache")]
    return _says(folder, "mypy", *options, "train.py")


def _says(folder: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def without_llmspec() -> None:
    """From here on `import llmspec` fails in this process."""
    for name in [n for n in sys.modules if n.split(".")[0] == "llmspec"]:
        del sys.modules[name]
    sys.modules["llmspec"] = None  # type: ignore[assignment]


@contextlib.contextmanager
def as_started_by_torchrun(program: Emitted, rank: int) -> Iterator[None]:
    """This process's directory, path and environment; only for a forked one, they stay."""
    os.chdir(program.spec.parent)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(program.world), "LOCAL_RANK": str(rank)}
    sys.path.insert(0, str(program.folder))
    without_llmspec()
    yield


def emitted_module(name: str) -> Any:
    return importlib.import_module(name)


def main_in_rank(rank: int, program: Emitted, prepare: Callable[[int], Any] | None) -> Any:
    """What torchrun would do with one process; returns what `prepare(rank)` returned."""
    with as_started_by_torchrun(program, rank):
        out = prepare(rank) if prepare else None
        with contextlib.redirect_stdout(open(os.devnull, "w")):
            emitted_module("train").main()
        return out


def run(program: Emitted, prepare: Callable[[int], Any] | None = None) -> list[Any]:
    """Train in forked ranks. prepare: called in each before main, may patch the runtime there."""
    return processes.run(program.world, main_in_rank, program, prepare, timeout_s=PATIENCE_S)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}


class Running:
    """A command in a process group of its own, read line by line; it is ended after its time."""

    def __init__(self, command: list[str], folder: Path):
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""
        self.timer = threading.Timer(PATIENCE_S, self.tell, [signal.SIGKILL])
        self.timer.start()

    def tell(self, number: int) -> None:
        """Send a signal to the whole group, as a terminal does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def await_line(self, text: str) -> None:
        assert self.process.stdout is not None, "started with a pipe"
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"ended before `{text}`:\n{self.output}")

    def finish(self) -> int:
        """The exit status of the command, once all that it started is gone too."""
        assert self.process.stdout is not None, "started with a pipe"
        try:
            # the pipe ends when the last process that holds it does
            self.output += self.process.stdout.read()
            status = self.process.wait()
            assert not in_group(self.process.pid), f"left processes behind:\n{self.output}"
            return status
        finally:
            self.timer.cancel()
            self.tell(signal.SIGKILL)


def torchrun(
    program: Emitted, *options: str, ranks: int | None = None, script: str = "train.py"
) -> Running:
    """Start the program as its launch.sh does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
    command += ["--nproc-per-node", str(ranks or program.world), str(program.folder / script)]
    return Running(command, program.spec.parent)


def in_group(group: int) -> list[int]:
    """Processes of a group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group and fields[0] != "Z":
                found.append(int(path.parent.name))
    return found
