"""The emitted directory as a product: short, clean, the same every time, whole, and right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end import programs
from tests.end_to_end.programs import GPT, LLAMA, Emitted

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2
MODELS = {"llama": LLAMA, "gpt": GPT}
# one process; then every axis, alone and together
PLANS = {
    1: "",
    2: "tensor = 2; data = 1; pipeline = 1",
    4: "data = 2; pipeline = 2; tensor = 1; zero = 3; microbatch = 1",
    8: "data = 2; pipeline = 2; tensor = 2; zero = 1; sequence = on",
}


def compiled(model: str, ranks: int, folder: Path) -> Emitted:
    folder.mkdir()
    programs.write_data(folder)
    text = programs.spec_text(MODELS[model], ranks, PLANS[ranks], steps=STEPS)
    return programs.compile_text(text, folder / "m.llmspec", folder / "build")


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Emitted]:
    base = tmp_path_factory.mktemp("emitted")
    return {
        (model, ranks): compiled(model, ranks, base / f"{model}{ranks}")
        for model in MODELS
        for ranks in PLANS
    }


@pytest.mark.parametrize("model", MODELS)
def test_every_mesh_trains_alike(emitted: dict, model: str) -> None:
    losses, norms = {}, {}
    for ranks in PLANS:
        program = emitted[model, ranks]
        assert program.world == ranks
        program.forget()
        programs.run(program)  # `import llmspec` fails in there
        losses[ranks] = program.losses()
        norms[ranks] = [row["gradient_norm"] for row in program.log() if "loss" in row]
        assert len(losses[ranks]) == STEPS
    for ranks in PLANS:
        np.testing.assert_allclose(losses[ranks], losses[1], rtol=1e-5)
        np.testing.assert_allclose(norms[ranks], norms[1], rtol=1e-5)


def test_short(emitted: dict) -> None:
    for program in emitted.values():
        own = [text for name, text in program.files.items() if name.count("/") == 0]
        code = [t for n, t in program.files.items() if n in ("model.py", "train.py", "kernels.py")]
        assert len(own) >= len(code) >= 2
        assert sum(text.count("\n") for text in code) < 1500
        assert max(len(line) for text in code for line in text.splitlines()) <= 100


def test_ruff_has_nothing_to_say(emitted: dict) -> None:
    for program in emitted.values():
        assert not programs.ruff_says(program.folder)


@pytest.mark.parametrize("key", [("llama", 8), ("gpt", 4)])
def test_mypy_has_nothing_to_say(emitted: dict, key: tuple[str, int]) -> None:
    assert not programs.mypy_says(emitted[key].folder)


COMPILE = """
import sys
from pathlib import Path
from llmspec.compiler import driver
for spec, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    session = driver.open_session(spec)
    driver.compile_plan(session, driver.find_plan(session).plan, Path(folder))
"""


def test_the_same_bytes_from_another_place_and_hash_seed(emitted: dict, tmp_path: Path) -> None:
    again = {key: emitted[key] for key in (("llama", 8), ("gpt", 4))}
    arguments: list[str] = []
    for i, program in enumerate(again.values()):
        arguments += [os.path.relpath(program.spec, tmp_path), str(tmp_path / str(i))]
    environment = programs.environment() | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", COMPILE, *arguments]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    for i, program in enumerate(again.values()):
        folder = tmp_path / str(i)
        names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
        assert names == set(program.files)
        for name, text in program.files.items():
            assert (folder / name).read_text() == text, name


def test_nothing_of_this_machine_is_in_it(emitted: dict) -> None:
    for program in emitted.values():
        for name, text in program.files.items():
            assert str(program.spec.parent) not in text, name
            assert str(ROOT) not in text, name


# torch brings networkx, jinja2 and sympy; everything else that llmspec depends on is refused
ONLY_TORCH = """
import sys
for name in ("llmspec", "lark", "numpy", "rich", "safetensors", "scipy", "tokenizers"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import train
train.main()
"""


@pytest.mark.parametrize("key", [("llama", 1), ("gpt", 1)])
def test_it_needs_nothing_but_torch(emitted: dict, key: tuple[str, int]) -> None:
    program = emitted[key]
    program.forget()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ONLY_TORCH, str(program.folder)],
        cwd=program.spec.parent,
        env=programs.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"step {STEPS}/{STEPS}" in done.stdout
    # it ends with what was measured beside what the plan predicted
    assert "predicted    measured" in done.stdout.splitlines()[-3]
    predicted = json.loads(program.files["plan.json"])["predicted"]["predicted"]
    measured = program.measured()
    assert measured["step"] == STEPS
    assert math.isclose(measured["predicted_step_s"], predicted["step_time_s"], rel_tol=1e-5)
    assert measured["predicted_memory_bytes"] == predicted["peak_memory_bytes"]
    assert measured["measured_step_s"] > 0 and measured["measured_memory_bytes"] > 2**25


@pytest.mark.long
def test_it_runs_where_only_torch_is(emitted: dict, tmp_path: Path) -> None:
    """In a fresh virtual environment: torch, and no llmspec, numpy or anything else."""
    program = emitted["llama", 2]
    program.forget()
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", *constraints, "torch==2.13.0"], check=True
    )
    for name in ("llmspec", "numpy"):
        # isolated: where pytest was started there may be a folder of that name
        command = [python, "-I", "-c", f"import {name}"]
        assert subprocess.run(command, capture_output=True).returncode == 1
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*command, str(program.folder / "train.py")],
        cwd=program.spec.parent,
        env=programs.environment(),
        check=True,
    )
    assert [row["step"] for row in program.log()] == list(range(1, STEPS + 1))
