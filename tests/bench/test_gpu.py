"""The benchmark for GPUs, on a CPU and in small: that it finds, compares, measures and reports."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu.__main__ import SHARES, Run, main
from bench.gpu.cases import CASES, spec_text, tiny
from bench.gpu.emitting import emit, language_name
from bench.gpu.kernels import Recorder, check_kernels
from bench.gpu.landed import PLAIN, VARIANTS
from bench.gpu.measuring import Device
from bench.gpu.page import page
from bench.gpu.processes import Row, rows_of_command
from bench.gpu.training import FIT_SHARE, fitted, ratios

CPU = Device(name="cpu", kind="cpu", bytes_per_s=1e10, flops=1e10, memory_bytes=0)


@torch.library.custom_op("tests_of_bench::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_kernels_are_found_and_a_wrong_one_is_seen() -> None:
    with Recorder() as seen:
        doubled(torch.ones(8))
        doubled(torch.zeros(3))
    assert list(seen.calls) == ["doubled"] and seen.calls["doubled"][1][0].shape == (8,)
    right, wrong, none = (
        next(check_kernels(seen.calls, SimpleNamespace(**plain), CPU))
        for plain in (
            {"doubled_plain": lambda x: 2 * x},
            {"doubled_plain": lambda x: 2.001 * x},
            {},
        )
    )
    assert right["right"] and not wrong["right"] and not none["right"]
    assert right["bound_s"] == pytest.approx(2 * 8 * 4 / 1e10)
    assert right["of_copy"] == pytest.approx(right["bound_s"] / right["kernel_s"])
    assert "doubled_plain" in none["failed"]


SAYS = "from bench.gpu.processes import say\nsay({'name': 'a', 'x': 1})\n"


def python(text: str, timeout_s: float) -> list[dict[str, object]]:
    return list(rows_of_command([sys.executable, "-c", text], dict(os.environ), timeout_s))


def test_what_a_process_said_is_kept_however_it_ends() -> None:
    row = {"name": "a", "x": 1}
    assert python(SAYS, 60) == [row]
    failed = "RuntimeError: no memory"
    assert python(f"{SAYS}raise RuntimeError('no memory')", 60) == [row, {"failed": failed}]
    late = python(f"{SAYS}import time\ntime.sleep(60)", 3)
    assert late in ([row, {"failed": "not done in 3 s"}], [{"failed": "not done in 3 s"}])


def test_a_section_that_fails_leaves_the_others(tmp_path: Path) -> None:
    run = Run(tmp_path / "gpu.json", 60.0, small=True)
    run.results |= {"device": asdict(CPU), "torch": "2.11"}

    def rows() -> Iterator[Row]:
        yield {"name": "a", "right": True, "kernel_s": 1.0}
        yield {"name": "a", "right": True, "kernel_s": 1.0, "eager_s": 2.0}
        raise ValueError("out of luck")

    run.section("kernels", rows())
    run.section("loss", iter([{"name": "b", "right": True}]))
    known = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["name"] for row in known["kernels"]] == ["a", "kernels"]
    assert known["kernels"][0]["eager_s"] == 2.0 and known["loss"][0]["right"]
    assert known["kernels"][1]["failed"] == "ValueError: out of luck"
    assert "out of luck" in (tmp_path / "gpu.md").read_text()


def test_as_many_layers_as_fit(tmp_path: Path) -> None:
    """Of a Llama 3 8B on a device of 40 GiB: 16 bytes for each of a layer's 218e6 parameters."""
    (case,) = (c for c in CASES if c.fit)
    device = replace(CPU, kind="cuda", memory_bytes=40 * 2**30)
    found, known = fitted(case, 'gpu("H200")', "bf16", tmp_path, device)
    assert known["fits"] and 1 <= found.shape.layers < 8
    assert known["predicted"]["peak_memory_bytes"] <= FIT_SHARE * device.memory_bytes


def test_ratios_are_to_the_faster_emitted_program() -> None:
    rows: list[Row] = [
        {"case": "m", "who": "emitted", "step_s": 2.0, "peak_bytes": 10},
        {"case": "m", "who": "emitted, fused kernels", "step_s": 1.0, "peak_bytes": 8},
        {"case": "m", "who": "plain", "step_s": 3.0, "peak_bytes": 16},
        {"case": "m", "who": "plain compiled", "failed": "no memory"},
    ]
    ratios(rows)
    assert [r.get("time_ratio") for r in rows] == [2.0, 1.0, 3.0, None]
    assert rows[2]["memory_ratio"] == 2.0


def test_a_gpu_is_called_by_its_longest_name_in_the_library() -> None:
    def called(name: str) -> str:
        return language_name(Device(name=name, kind="cuda", bytes_per_s=1, flops=1, memory_bytes=1))

    assert called("NVIDIA H200") == 'gpu("H200")'
    assert called("NVIDIA A100-SXM4-80GB") == 'gpu("A100-SXM4-80GB")'
    with pytest.raises(SystemExit, match="--gpu NAME"):
        called("NVIDIA Unheard-of 3000")


@pytest.mark.parametrize("variant", [PLAIN, *VARIANTS], ids=lambda v: v.name)
def test_programs_for_gpus_compile(variant, tmp_path: Path) -> None:
    text = spec_text(
        tiny(CASES[1]), 'gpu("H200")', precision=variant.precision, pins=variant.pins, steps=6
    )
    known = emit(text, tmp_path)
    assert known["fits"] and (tmp_path / "program" / "train.py").exists()


def test_the_loss_in_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "--only", "loss", "--out", str(tmp_path / "gpu.json")]) == 0
    known = json.loads((tmp_path / "gpu.json").read_text())
    assert known["loss"][0]["right"] and known["loss"][0]["kernel_s"] > 0
    assert (tmp_path / "gpu.md").read_text() == page(known)
    assert "The loss" in capsys.readouterr().out


def test_wrong_is_an_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*given: object, **more: object) -> Iterator[Row]:
        yield {"name": "plain", "right": False}
        yield {"name": "late", "failed": "no time left for it"}

    monkeypatch.setattr("bench.gpu.landed.check", check)
    monkeypatch.setattr("bench.gpu.__main__.this_device", lambda small: CPU)
    arguments = ["--tiny", "--only", "landed", "--out", str(tmp_path / "gpu.json")]
    assert main(arguments) == 1


@pytest.mark.long
def test_all_of_it_in_small(tmp_path: Path) -> None:
    """A minute of one core; the limit is for a machine that does other things besides."""
    assert main(["--tiny", "--limit", "900", "--out", str(tmp_path / "gpu.json")]) == 0
    known = json.loads((tmp_path / "gpu.json").read_text())
    cases = {case.name for case in CASES if not case.fit}
    assert {row["case"] for row in known["kernels"]} == cases
    assert not any("failed" in row for section in SHARES for row in known[section]), known
    for case in cases:
        rows = [row for row in known["training"] if row["case"] == case]
        assert {"emitted", "plain"} <= {row["who"] for row in rows}
        own = next(row for row in rows if row["who"].startswith("emitted"))
        # random tokens, weights as they begin: the logarithm of the vocabulary, or little less
        assert all(row["loss"] == pytest.approx(5.5, abs=0.3) for row in rows)
        assert min(row["time_ratio"] for row in rows if "emitted" in row["who"]) == 1
        assert own["predicted_s"] > 0 and own["mfu"] > 0
    assert {row["name"] for row in known["landed"]} == {"plain", "recompute full"}
    assert any(row["name"] == "tune" and row["right"] for row in known["tools"])
