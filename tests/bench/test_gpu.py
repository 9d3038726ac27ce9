"""The benchmark for GPUs, on a CPU and in small: that it finds, compares, measures and reports."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.gpu.__main__ import main
from bench.gpu.cases import CASES, spec_text, tiny
from bench.gpu.emitting import emit, language_name
from bench.gpu.kernels import Recorder, check_kernels
from bench.gpu.landed import PLAIN, VARIANTS
from bench.gpu.measuring import Device
from bench.gpu.page import page

CPU = Device(name="cpu", kind="cpu", bytes_per_s=1e10, flops=1e10, memory_bytes=0)


@torch.library.custom_op("tests_of_bench::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_kernels_are_found_and_a_wrong_one_is_seen() -> None:
    with Recorder() as seen:
        doubled(torch.ones(8))
        doubled(torch.zeros(3))
    assert list(seen.calls) == ["doubled"] and seen.calls["doubled"][1][0].shape == (8,)
    right, wrong = (
        check_kernels(seen.calls, SimpleNamespace(doubled_plain=plain), CPU)[0]
        for plain in (lambda x: 2 * x, lambda x: 2.001 * x)
    )
    assert right["right"] and not wrong["right"]
    assert right["bound_s"] == pytest.approx(2 * 8 * 4 / 1e10)


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


@pytest.mark.long
def test_all_of_it_in_small(tmp_path: Path) -> None:
    assert main(["--tiny", "--out", str(tmp_path / "gpu.json")]) == 0
    known = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["case"] for row in known["kernels"]} == {case.name for case in CASES}
    for case in CASES:
        rows = [row for row in known["training"] if row["case"] == case.name]
        assert not any("failed" in row for row in rows), rows
        own = next(row for row in rows if row["who"] == "emitted")
        # random tokens, weights as they begin: the logarithm of the vocabulary, or little less
        assert all(row["loss"] == pytest.approx(5.5, abs=0.3) for row in rows)
        assert own["time_ratio"] == 1 and own["predicted_s"] > 0 and own["mfu"] > 0
