"""Triton's own word: kernels in its interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.driver import Session
from llmspec.compiler.emit.package import write
from llmspec.compiler.search import Found
from tests.compiler.verify.models import MODELS, planned, spec_text
from tests.compiler.verify.test_context_pytorch import MODEL as WRITTEN_OUT

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


def written_out(folder: Path) -> dict[str, str]:
    """A GPT of PyTorch's operators that drops attention's weights."""
    (folder / "gpt.py").write_text(WRITTEN_OUT)
    spec = folder / "spec.llmspec"
    spec.write_text("""model m = python("gpt.py", "Model", dropout=0.2)
cluster c { node = 1 * gpu("H200") }
train t {
    model = m; cluster = c; dataset = synthetic(); batch = 8 sequences; sequence_length = 16
    steps = 5; precision = fp32
}
plan { microbatch = 2; kernels = triton }
""")
    session = Session(dsl.load(spec), trust=True)
    found = driver.find_plan(session)
    assert isinstance(found, Found)
    files = driver.emit_plan(session, found.plan)
    write(files, folder)
    assert "def test_softmax_dropout()" in files["test_kernels.py"]
    return files


@pytest.mark.parametrize("model", [*MODELS, "written out"])
def test_every_kernel_of_a_program(model: str, tmp_path: Path) -> None:
    """The test that the program itself carries: both passes, odd shapes, 1e-5."""
    files = written_out(tmp_path) if model == "written out" else program(model, tmp_path)
    said = python(["test_kernels.py"], cwd=tmp_path, TRITON_INTERPRET="1")
    tested = files["test_kernels.py"].count("def test_")
    assert tested >= 4
    assert said.count("is right") == tested


TINY = """
model m {
    vocab = 64; context = 8; width = 24
    block layer(x) {
        x = x + dropout(attention(layernorm(x), heads=2, causal, bias), 0.1)
        x = x + swiglu(rmsnorm(x), ffn=40)
    }
    tokens -> embed(positions=learned) -> dropout(0.1) -> layer * 2 -> layernorm -> unembed(tied)
}
"""

ONE_STEP = """
import sys, torch
import torch.distributed as dist
from model import Model
from runtime.mesh import Mesh

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = Model(Mesh.create(torch.device("cpu")))
model.to_empty(device="cpu")
torch.manual_seed(1)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
ids = torch.arange(16).view(2, 8)
loss = model(ids, ids + 1, torch.arange(2))
loss.backward()
found = {n: p.grad for n, p in model.named_parameters()}
torch.save(found | {"loss": loss.detach()}, sys.argv[1])
"""


def test_a_whole_program_in_the_interpreter(tmp_path: Path) -> None:
    """Loss and every gradient of one step: Triton's kernels against their plain functions."""
    session, plan = planned(spec_text(TINY, 1, 2, "microbatch = 2; kernels = triton"))
    write(driver.emit_plan(session, plan), tmp_path)
    (tmp_path / "one_step.py").write_text(ONE_STEP)
    for number in "01":
        python(["one_step.py", f"{number}.pt"], cwd=tmp_path, TRITON_INTERPRET=number)
    plain, interpreted = (torch.load(tmp_path / f"{n}.pt") for n in "01")
    assert set(plain) == set(interpreted)
    # a bias of keys has no gradient at all: softmax does not see it
    floor = 1e-3 * torch.stack([g.norm() for n, g in plain.items() if n != "loss"]).norm()
    for name, value in plain.items():
        error = (interpreted[name] - value).norm() / value.norm().clamp(min=floor)
        assert error < 1e-4, f"{name}: {error:.2g}"


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
