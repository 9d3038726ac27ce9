"""Tuning: what is measured, what is chosen, what is written, and that a program then uses it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmspec.compiler import driver
from llmspec.compiler.cli.main import main
from llmspec.compiler.search.search import Found
from llmspec.compiler.tune import run
from llmspec.compiler.tune.candidates import PER_THREAD, REGISTERS, tiles
from llmspec.compiler.tune.file import with_tuned
from llmspec.compiler.tune.worker import Bench
from llmspec.dsl import SpecError, check, load
from llmspec.dsl.tuned import TunedKernel, TunedPass
from llmspec.runtime import fused


@pytest.mark.parametrize("columns", [24, 128, 4096, 14_336, 53_248, 128_256])
@pytest.mark.parametrize("whole_rows", [True, False])
def test_candidates_fit_the_registers(columns: int, whole_rows: bool) -> None:
    found = tiles(columns, whole_rows=whole_rows, alive=5)
    assert len(found) == len(set(found))
    for rows, wide, warps, stages in found:
        per_thread = rows * wide / (32 * warps)
        assert PER_THREAD[0] <= per_thread <= PER_THREAD[1] and 5 * per_thread <= REGISTERS
        assert stages == 1 and rows & (rows - 1) == wide & (wide - 1) == 0
        assert wide >= columns if whole_rows else wide <= 4096
    # rows of 53,248 and of the vocabulary do not fit 32 warps
    assert bool(found) == (not whole_rows or columns <= 14_336)


# --------------------------------------------------------------------------------------------------
# The measuring loop, on a clock of its own

RULE = (64, 32, 4, 1)
SECONDS = {RULE: 4.0, (32, 32, 2, 1): 3.0, (16, 32, 1, 1): 2.0, (16, 32, 1, 2): 1.5}
WRONG, TOO_LARGE = (8, 32, 1, 1), (4096, 32, 32, 1)


def bench(seconds: dict[Any, float], eager_s: float = 9.0) -> Bench:
    """Kernels whose time is told by their tile; what has none is PyTorch's."""
    at: list[Any] = [None]

    def flat(columns: int, measured: object = None) -> fused.Tile:
        return fused.flat(columns)

    kernels = SimpleNamespace(flat=flat)

    def double_triton(x: torch.Tensor) -> torch.Tensor:
        tile = kernels.flat(x.shape[-1])
        at[0] = tile.rows, tile.columns, tile.warps, tile.stages
        if at[0] == TOO_LARGE:
            raise RuntimeError("out of resource: shared memory")
        return x * (2.1 if at[0] == WRONG else 2.0)

    kernels.double_triton = double_triton

    def clock(call: Any) -> float:
        at[0] = None
        call()
        return seconds.get(at[0], eager_s) if at[0] is not None else eager_s

    return Bench(kernels, fused, torch.device("cpu"), clock, lambda: 1.0)


def case(stages: list[int]) -> dict[str, Any]:
    one = {
        "name": "double",
        "rule": "flat",
        "columns": 32,
        "arguments": [{"shape": [8, 32], "dtype": "float32", "raised": 0.0}],
        "scalars": [],
        "tiles": [WRONG, TOO_LARGE, *list(SECONDS)[1:3]],
        "stages": stages,
    }
    eager = {
        "inputs": [{"name": "x", "shape": [8, 32], "dtype": "float32", "raised": 0.0}],
        "imports": [],
        "statements": [["y", "F.relu(x)"]],
        "forward": [["y", "F.relu(x)"]],
        "results": ["y"],
    }
    return {"forward": one, "backward": one, "eager": eager}


def test_the_fastest_right_tile_is_taken() -> None:
    seconds = SECONDS | {WRONG: 0.1, TOO_LARGE: 0.1}
    found = bench(seconds).case(case([2, 3]))["forward"]
    assert found == {"tile": [16, 32, 1, 2], "seconds": 1.5, "rule_s": 4.0, "eager_s": 9.0}
    assert bench(seconds).case(case([]))["backward"]["seconds"] == 2.0
    assert bench(seconds).case(case([]))["backward"]["eager_s"] == 8.0  # less autograd's own


def test_a_kernel_that_does_not_run_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = bench(SECONDS)
    monkeypatch.setattr(broken.kernels, "double_triton", lambda x: x.no_such_thing)
    with pytest.raises(AttributeError):
        broken.case(case([]))


# --------------------------------------------------------------------------------------------------
# The file

PASS = TunedPass(rows=2, columns=1024, warps=4, rate=3.9e12, by_rule=3.5e12, eager=2e12)
GATE = TunedKernel(name="silu_gate", columns=14336, width=2, forward=PASS, backward=PASS)
NORM = TunedKernel(name="rmsnorm", columns=1024, width=2, structure="1f", forward=PASS)


def test_what_stands_in_the_file_stays() -> None:
    before = '# mine\ncluster lab { node = 2 * gpu("H200") }  # two\n'
    first = with_tuned(before, "lab.llmspec", "lab", [GATE], ["on an H200"])
    assert (
        first.startswith("# mine\ncluster lab {") and "# two" in first and "# on an H200" in first
    )
    again = with_tuned(first, "lab.llmspec", "lab", [NORM], ["later"])
    assert again.count("kernels lab {") == 1 and again.count("kernels = lab") == 1
    assert "silu_gate" in again and "rmsnorm" in again and "on an H200" not in again
    assert with_tuned(again, "lab.llmspec", "lab", [NORM], ["later"]) == again


def test_what_was_written_checks_and_is_read(tmp_path: Path) -> None:
    path = tmp_path / "lab.llmspec"
    path.write_text(with_tuned('cluster lab { node = gpu("H200") }', "", "lab", [GATE, NORM], []))
    spec = tmp_path / "spec.llmspec"
    spec.write_text(
        'import gpt2\nimport "lab.llmspec"\n'
        "train { model = gpt2_small; cluster = lab; dataset = synthetic }\n"
    )
    assert check(spec) == ()
    assert load(spec).cluster.kernels.kernels == (GATE, NORM)


def test_a_file_that_is_no_spec_is_left_alone() -> None:
    with pytest.raises(SpecError):
        with_tuned("cluster {", "lab.llmspec", "lab", [GATE], [])


# --------------------------------------------------------------------------------------------------
# From a spec to a program

SPEC = """
import "lab.llmspec"
model m {
    vocab = 64; context = 8; width = 16
    block layer(x) { x = x + swiglu(x, ffn=24) }
    tokens -> embed -> layer * 2 -> unembed
}
train bench { model = m; cluster = lab; dataset = synthetic; batch = 2 sequences; steps = 3
              precision = fp32 }
plan { microbatch = 2; kernels = triton }
"""
CPU = "cluster lab { node = 1 * cpu }\n"


def test_from_measuring_to_launching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run in Triton's interpreter, where PyTorch's own operators are always faster: what
    stays apart is then said to be fused, so that the tiles are seen in the program, too."""
    pytest.importorskip("triton", reason="comes with the extra `dev`, on Linux")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    hardware, spec = tmp_path / "lab.llmspec", tmp_path / "spec.llmspec"
    hardware.write_text(CPU)
    spec.write_text(SPEC)
    told: list[tuple[str, int, int]] = []
    session = driver.open_session(str(spec))
    effort = run.Effort(seconds=0.0, tiles=2)
    (found,) = run.tune(session, effort, lambda *one: told.append(one))
    assert (found.name, found.columns, found.width, found.fused) == ("silu_gate", 24, 4, False)
    assert told[0][1] == 1 and all(done <= total for _, done, total in told)
    hardware.write_text(with_tuned(CPU, str(hardware), "lab", [found], ["here"]))
    assert "kernels.py" not in emitted(spec)
    tile = found.forward
    hardware.write_text(hardware.read_text().replace("use: eager", "use: triton"))
    numbers = f"{tile.rows}, {tile.columns}, {tile.warps}, {tile.stages}"
    assert f"tile = flat(columns, measured={{24: ({numbers})}})" in emitted(spec)["kernels.py"]


def emitted(spec: Path) -> dict[str, str]:
    session = driver.open_session(str(spec))
    found = driver.find_plan(session)
    assert isinstance(found, Found)
    return driver.emit_plan(session, found.plan)


def test_without_a_gpu_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    Path("lab.llmspec").write_text(CPU)
    Path("spec.llmspec").write_text(SPEC)
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "spec.llmspec"])
    said = capsys.readouterr().err
    assert stopped.value.code and "no GPU here" in said and "tiles are by rule" in said
    assert not Path("here.llmspec").exists()
