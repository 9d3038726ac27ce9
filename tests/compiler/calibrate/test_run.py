"""A calibration of this machine, tiny: every measurement, the program, the file, the command."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import llmspec
from llmspec.compiler.calibrate import cases, run
from llmspec.compiler.cli.main import main

TINY = replace(
    cases.CPU,
    seconds=0.002,
    rows=64,
    widths=(32, 64),
    model=(1, 64, 4, 96, 64, 32),
    sequences=2,
    vector_bytes=2**16,
    message_bytes=(2**10, 2**20),
    unit_width=64,
    steps=4,
)
SPEC = """\
import llama
import "{file}"
model tiny = llama(layers=2, width=32, heads=4, kv_heads=2, ffn=64, vocab=64, context=16)
train run {{
    model = tiny; cluster = here; dataset = synthetic; batch = 4 sequences; steps = 3
    precision = fp32
}}
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, dict]:
    """The command, in a folder of its own; the file, and what it printed as data."""
    folder = tmp_path_factory.mktemp("calibrated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "CPU", TINY)
        patch.setattr(run.torch.cuda, "is_available", lambda: False)
        said: list[object] = []
        patch.setattr("llmspec.compiler.cli.calibrating.product_json", said.append)
        with pytest.raises(SystemExit) as ended:
            main(["calibrate", str(folder / "here.llmspec"), "--json"])
    assert ended.value.code == 0
    return folder / "here.llmspec", said[0]  # type: ignore[return-value]


def test_numbers_are_sane(written):
    _, face = written
    found = face["constants"]
    assert face["cluster"] == "here" and face["devices"] == 2
    assert 1e8 < found["peak_flops"]["fp32"] < 1e14
    assert 1e8 < found["memory_bytes_per_s"] < 1e13
    assert 1e-7 < found["launch_s"] < 1e-2
    assert 2**26 < found["fixed_bytes"] < 2**33
    assert 0 < found["matmul_efficiency"] <= 1 and 0 < found["sustained"] <= 1
    assert 1e5 < found["link_bytes_per_s"] < 1e12 and 1e-7 < found["link_latency_s"] < 1
    assert set(found["collectives"]) == set(cases.KINDS)
    assert {"linear", "attention", "rms_norm", "layer_norm", "cross_entropy"} < set(
        found["operators"]
    )
    assert {"update", "weight", "unit"} < set(found["operators"])
    assert all(n > 0 for row in found["operators"].values() for n in row)


def test_the_file_is_a_cluster_that_plans(written, tmp_path: Path):
    file, face = written
    spec = tmp_path / "m.llmspec"
    spec.write_text(SPEC.format(file=file.name))
    (tmp_path / file.name).write_text(file.read_text())
    assert llmspec.dsl.format_text(file.read_text(), path="here") == file.read_text()
    plan = llmspec.plan(str(spec))
    assert plan["plan"]["world_size"] == 2
    assert plan["predicted"]["memory_bytes"]["fixed"] == pytest.approx(
        face["constants"]["fixed_bytes"], abs=2**20
    )
    assert 0 < plan["predicted"]["step_time_s"] < 100


def test_names_that_nobody_measured_are_refused(written, tmp_path: Path):
    file, _ = written
    text = file.read_text()
    for name in ("all_gather", "rms_norm"):
        assert f"{name}:" in text
        (tmp_path / file.name).write_text(text.replace(f"{name}:", "nobody_knows:"))
        spec = tmp_path / "m.llmspec"
        spec.write_text(SPEC.format(file=file.name))
        with pytest.raises(llmspec.dsl.SpecError, match="nobody_knows"):
            llmspec.plan(str(spec))


def refusal(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", *words])
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_refusals_before_anything_is_measured(capsys, tmp_path: Path, monkeypatch):
    file = tmp_path / "here.llmspec"
    file.write_text("")
    assert "add --force" in refusal(capsys, str(file))
    assert "is a folder" in refusal(capsys, str(tmp_path))
    assert "there is no folder" in refusal(capsys, str(tmp_path / "no" / "here.llmspec"))
    assert "name of a cluster" in refusal(capsys, str(tmp_path / "2-fast.llmspec"))
    assert "0 processes" in refusal(capsys, str(tmp_path / "a.llmspec"), "--processes", "0")
    monkeypatch.setattr("llmspec.compiler.cli.calibrating.os.access", lambda *rest: False)
    assert "no permission to write" in refusal(capsys, str(tmp_path / "b.llmspec"))


def test_a_process_that_stops_is_named(capsys, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(
        "llmspec.compiler.calibrate.run.calibrate",
        lambda *rest: list(run.lines_of(SETTING, [["llmspec.no_such_module"]], alone=True)),
    )
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", str(tmp_path / "here.llmspec")])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "Failed" in said.err and "no_such_module" in said.out
    assert not (tmp_path / "here.llmspec").exists()


SETTING = run.Setting(
    name="x", processes=1, effort=TINY, gpu=False, dtypes={"fp32": "float32"}, trains="fp32"
)
