"""Triton's own word: kernels in its interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmspec.compiler import driver
from llmspec.compiler.emit.package import write
from tests.compiler.verify.models import MODELS, planned, spec_text

pytest.importorskip("triton", reason="comes with the extra `dev`, on Linux")

ROOT = Path(__file__).parents[3]
TABLE = ROOT / "tests/golden/kernels.txt"


def python(arguments: list[str], cwd: Path = ROOT, **variables: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment |= variables
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert not done.returncode, done.stdout + done.stderr
    return done.stdout


def program(model: str, folder: Path, pins: str = "microbatch = 4") -> dict[str, str]:
    """The emitted program with kernels, written."""
    session, plan = planned(spec_text(MODELS[model], 1, 8, f"{pins}; kernels = triton"))
    files = driver.emit_plan(session, plan)
    write(files, folder)
    return files


@pytest.mark.parametrize("model", MODELS)
def test_every_kernel_of_a_program(model: str, tmp_path: Path) -> None:
    """The test that the program itself carries: both passes, odd shapes, 1e-5."""
    files = program(model, tmp_path)
    said = python(["test_kernels.py"], cwd=tmp_path, TRITON_INTERPRET="1")
    tested = files["test_kernels.py"].count("def test_")
    assert tested >= 4
    assert said.count("is right") == tested


@pytest.mark.long
def test_kernels_of_many_groups() -> None:
    said = python(["-m", "tests.compiler.kernels.interpreted"])
    assert len(said.splitlines()) >= 9


@pytest.mark.parametrize("name", ["residual_rmsnorm", pytest.param("", marks=pytest.mark.long)])
def test_what_kernels_take(name: str) -> None:
    """Nothing is spilled; registers and shared memory are those of the table, which `compiled.py`
    prints. name: of the kernels' names."""
    version, *lines = python(["-m", "tests.compiler.kernels.compiled", name]).splitlines()
    version_there, *table = TABLE.read_text().splitlines()
    assert len(lines) >= 6
    assert all(line.endswith("spilled 0") for line in lines)
    if version == version_there:  # another Triton allocates in its own way
        assert lines == [line for line in table if name in line.split()[0]]
