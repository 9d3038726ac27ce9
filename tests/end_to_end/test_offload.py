"""Whole runs of emitted programs with host memory in use: the same losses, and checkpoints that
plans with and without it continue."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.programs import LLAMA, Emitted, compile_text, run, spec_text, write_data

STEPS, SAVED = 6, 3
PLANS = [
    "data = 2; zero = 3; microbatch = 2; offload = [activations, parameters]",
    "data = 2; zero = 1; microbatch = 2; offload = [activations, optimizer]",
]


def compiled(folder: Path, pins: str) -> Emitted:
    folder.mkdir(parents=True)
    write_data(folder)
    more = f"log = every(1); checkpoint = every({SAVED}, keep=2)"
    text = spec_text(LLAMA, 2, pins, steps=STEPS, more=more)
    return compile_text(text, folder / "run.llmspec", folder / "build")


def continued(program: Emitted, before: Emitted) -> list[float]:
    """Losses from another program's first checkpoint on."""
    program.forget()
    name = f"step_{SAVED:06d}"
    to = program.folder / "checkpoints" / name
    shutil.copytree(before.folder / "checkpoints" / name, to)
    run(program)
    return program.losses()[-(STEPS - SAVED) :]


@pytest.mark.long
@pytest.mark.parametrize("pins", PLANS)
def test_same_run_with_and_without_offload(pins: str, tmp_path: Path) -> None:
    away = compiled(tmp_path / "away", pins)
    plain = compiled(tmp_path / "plain", pins.partition("; offload")[0])
    run(away)
    run(plain)
    losses = plain.losses()
    assert len(losses) == STEPS and losses[-1] < losses[0]
    assert away.losses() == losses
    assert continued(plain, away) == losses[SAVED:]
    shutil.copytree(plain.folder / "checkpoints", tmp_path / "kept")
    run(plain)
    assert continued(away, plain) == losses[SAVED:]
