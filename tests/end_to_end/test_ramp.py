"""A batch that grows: every sample once, the same run after a resume and on another plan."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end import programs
from tests.end_to_end.programs import Emitted
from tests.end_to_end.test_resume import recording

STEPS = 7
SIZES = [2, 2, 4, 4, 8, 8, 8]
DATA = "data = 2; zero = 2; microbatch = 1"
PIPELINE = "pipeline = 2; microbatch = 1"
TENSOR = "tensor = 2; microbatch = 2"


def compiled(folder: Path, pins: str, steps: int = STEPS) -> Emitted:
    held_out = 'validate = every(3, dataset=text("data.txt"), batches=1); checkpoint = every(3)'
    text = programs.spec_text(programs.LLAMA, 2, pins, steps=steps, more=held_out)
    ramp = "ramp(from=2 sequences, to=8 sequences, steps=4)"
    text = text.replace("8 sequences", ramp).replace("cosine(to=3e-4)", "cosine(to=3e-4, steps=5)")
    return programs.compile_text(text, folder / "m.llmspec", folder / "build" / "run")


@pytest.mark.parametrize(
    ("pins", "other"), [(DATA, PIPELINE), pytest.param(PIPELINE, TENSOR, marks=pytest.mark.long)]
)
def test_ramp(tmp_path: Path, pins: str, other: str) -> None:
    programs.write_data(tmp_path)
    program = compiled(tmp_path, pins)
    assert "RAMP = ((2, 2), (2, 4))" in program.files["train.py"]
    read = programs.run(program, recording)
    trained = [row for row in program.log() if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert [row["tokens"] for row in trained] == [16 * n for n in np.cumsum(SIZES)]
    if "data = 2" in pins:
        # validation reads a batch of 8 after steps 3, 6 and 7, always the same
        seen = sorted(read[0] + read[1])
        assert seen == sorted([*range(sum(SIZES)), *3 * list(range(8))])
    whole = program.log()
    rates = [row["learning_rate"] for row in trained]
    np.testing.assert_allclose(rates[:2], [1.5e-3, 3e-3])  # by steps, whatever their size

    # stopped after step 3, in the middle of the second size, the same plan repeats the run ...
    for path in (program.folder / "checkpoints").glob("step_*"):
        if path.name != "step_000003":
            shutil.rmtree(path)
    programs.run(program)
    assert program.log() == whole
    # ... and another one goes on from there
    for path in (program.folder / "checkpoints").glob("step_*"):
        if path.name != "step_000003":
            shutil.rmtree(path)
    changed = compiled(tmp_path, other)
    programs.run(changed)
    losses = [row["loss"] for row in trained]
    assert changed.losses()[:3] == losses[:3]
    np.testing.assert_allclose(changed.losses(), losses, rtol=1e-5)
