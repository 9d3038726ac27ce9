"""A run that was stopped, however it was, goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.end_to_end import programs
from tests.end_to_end.programs import Emitted

STEPS, BATCH, KILLED = 8, 8, 5
LOST = "died with exit code -9"
EVERY_2 = "checkpoint = every(2, keep=2)"
ZERO_3 = "data = 2; zero = 3; tensor = 1; pipeline = 1"
OTHER_PLANS = {
    "tensor 2": "tensor = 2; data = 1; pipeline = 1",
    "pipeline 2": "pipeline = 2; data = 1; tensor = 1; microbatch = 2",
    "data 2, zero 0": "data = 2; zero = 0; tensor = 1; pipeline = 1",
}


def llama(folder: Path, pins: str = ZERO_3, model: str = programs.LLAMA) -> Emitted:
    """Compiled into build/run beside the spec, over whatever stands there."""
    text = programs.spec_text(model, 2, pins, steps=STEPS, more=EVERY_2)
    return programs.compile_text(text, folder / "m.llmspec", folder / "build" / "run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    programs.write_data(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """The log of each model's whole run on the first plan."""
    logs = {}
    for name, model in (("llama", programs.LLAMA), ("gpt", programs.GPT)):
        folder = tmp_path_factory.mktemp(name)
        programs.write_data(folder)
        program = llama(folder, model=model)
        samples = programs.run(program, recording)
        assert sorted(samples[0] + samples[1]) == list(range(STEPS * BATCH))
        logs[name] = program.log()
        assert [row["step"] for row in logs[name]] == list(range(1, STEPS + 1))
    return logs


def killed_at(step: int, victim: int) -> Callable[[int], None]:
    """One rank is gone, as the kernel takes it, when this step (from 0) asks for its batch."""

    def prepare(rank: int) -> None:
        dataset = programs.emitted_module("runtime.batches").Dataset
        batch = dataset.batch

        def last_batch(self: Any, at: int, *rest: Any) -> Any:
            if rank == victim and at == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return batch(self, at, *rest)

        dataset.batch = last_batch

    return prepare


def recording(rank: int) -> list[int]:
    """The numbers of all samples that this rank reads."""
    dataset = programs.emitted_module("runtime.batches").Dataset
    read, seen = dataset.read, []

    def read_and_note(self: Any, counters: np.ndarray) -> np.ndarray:
        seen.extend(counters.tolist())
        return read(self, counters)

    dataset.read = read_and_note
    return seen


@pytest.mark.parametrize(("model", "victim"), [("llama", 1), ("gpt", 0)])
def test_killed_and_started_again_the_curve_is_the_same(
    folder: Path, uninterrupted: dict, model: str, victim: int
) -> None:
    program = llama(folder, model={"llama": programs.LLAMA, "gpt": programs.GPT}[model])
    with pytest.raises(AssertionError, match=LOST):
        programs.run(program, killed_at(KILLED, victim))
    assert program.checkpoints()[0] == "step_000002"
    programs.run(program)
    assert program.log() == uninterrupted[model]


@pytest.mark.parametrize("pins", OTHER_PLANS.values(), ids=OTHER_PLANS)
def test_started_again_on_another_plan_it_goes_on(
    folder: Path, uninterrupted: dict, pins: str
) -> None:
    first = llama(folder)
    with pytest.raises(AssertionError, match=LOST):
        programs.run(first, killed_at(KILLED, 1))
    second = llama(folder, pins)
    assert second.files["plan.json"] != first.files["plan.json"]
    samples = programs.run(second, recording)
    done = KILLED - 1  # the newest whole checkpoint, or the one before it
    log = second.log()
    assert [row["step"] for row in log] == list(range(1, STEPS + 1))
    expected = [row["loss"] for row in uninterrupted["llama"]]
    np.testing.assert_allclose(second.losses(), expected, rtol=1e-5)
    assert second.losses()[:2] == expected[:2]
    every = set().union(*samples)
    resumed_at = min(every) // BATCH
    assert resumed_at in (done - 2, done)
    assert every == set(range(resumed_at * BATCH, STEPS * BATCH))
    if "data = 2" in pins:
        assert not set(samples[0]) & set(samples[1])
        assert len(samples[0]) + len(samples[1]) == len(every)


def damage(path: Path) -> str:
    """Cut the largest file of the checkpoint in half; its name."""
    victim = max((p for p in path.glob("*.distcp")), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    return victim.name


def only_torchrun_complains(output: str) -> bool:
    """torchrun itself raises when a process ends with a status; the program must not."""
    return output.count("Traceback") == output.count("raise ChildFailedError") <= 1


def test_a_damaged_checkpoint_and_too_few_processes_are_one_line(folder: Path) -> None:
    program = llama(folder)
    programs.run(program)
    log = program.log()
    newest = program.folder / "checkpoints" / program.checkpoints()[-1]
    name = damage(newest)
    run = programs.torchrun(program)
    assert run.finish() == 1
    lines = [line for line in run.output.splitlines() if "damaged" in line and name in line]
    assert len(lines) == 1, run.output
    assert "step_000006 is whole" in lines[0]
    assert only_torchrun_complains(run.output)
    assert program.log() == log
    assert program.checkpoints() == ["step_000006", "step_000008"]

    run = programs.torchrun(program, ranks=1)
    assert run.finish() == 1
    assert run.output.count("the plan needs 2 processes (shards 2), but 1 was started") == 1
    assert only_torchrun_complains(run.output)


LONG = 100_000  # steps: it never ends by itself


def long_spec() -> str:
    more = f"checkpoint = every({LONG - 1}); log = every(1)"
    return programs.spec_text(programs.LLAMA, 2, ZERO_3, steps=LONG, more=more)


def step_line(step: int) -> str:
    return f"step {step:>6}/{LONG}"


def stopped_steps(program: Emitted) -> int:
    """How many steps were done, which log and checkpoint must agree about."""
    log = program.log()
    assert [row["step"] for row in log] == list(range(1, len(log) + 1))
    assert program.checkpoints()[-1] == f"step_{len(log):06d}"
    return len(log)


def test_sigterm_leaves_a_checkpoint_to_go_on_from(folder: Path) -> None:
    program = programs.compile_text(long_spec(), folder / "m.llmspec", folder / "build" / "run")
    run = programs.torchrun(program)
    run.await_line(step_line(3))
    run.process.terminate()  # as Slurm and Kubernetes do: torchrun passes it on
    assert run.finish() != 0, "torchrun says by its status that it was stopped"
    assert "stopped after step" in run.output, run.output
    done, log = stopped_steps(program), program.log()

    run = programs.torchrun(program)
    run.await_line(f"resumed after step {done}")
    run.await_line(step_line(done + 2))
    run.process.terminate()
    run.finish()
    assert stopped_steps(program) > done
    assert program.log()[:done] == log


def test_ctrl_c_leaves_a_checkpoint_and_no_processes(folder: Path) -> None:
    spec = folder / "m.llmspec"
    spec.write_text(long_spec())
    command = [sys.executable, "-m", "llmspec.compiler.cli", "train", "m.llmspec"]
    run = programs.Running(command, folder)
    run.await_line(step_line(3))
    run.tell(signal.SIGINT)
    status = run.finish()
    assert "Traceback" not in run.output, run.output
    assert "stopped after step" in run.output, run.output
    assert status == 130, run.output
    program = Emitted(spec=spec, folder=folder / "build" / "run", world=2, files={})
    assert stopped_steps(program) >= 3


LOST_ONCE = f"""
import os, pathlib, signal
from runtime.batches import Dataset
batch, marker = Dataset.batch, pathlib.Path("killed")
def once(self, at, *rest):
    if os.environ["RANK"] == "1" and at == {KILLED} and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, at, *rest)
Dataset.batch = once
import train
train.main()
"""


@pytest.mark.long
def test_torchrun_restarts_after_a_lost_process(folder: Path, uninterrupted: dict) -> None:
    program = llama(folder)
    (program.folder / "lost_once.py").write_text(LOST_ONCE)
    run = programs.torchrun(program, "--max-restarts=2", script="lost_once.py")
    assert run.finish() == 0, run.output
    assert (folder / "killed").exists()
    assert program.log() == uninterrupted["llama"]
