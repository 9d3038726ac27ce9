"""Cases of `python -m bench.calibrated` are what they are called; errors are counted right."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import calibrated
from bench.calibrated import CASES, FILES, Result
from llmspec import dsl

HARDWARE = """\
cpu "{name}" {{ memory = 8 GiB at 10 GB/s; peak = {{ fp32: 100 GFLOP/s }}; link = 1 GB/s }}
cluster {name} {{ node = {count} * cpu("{name}") }}
"""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_are_specs_on_the_calibrated_cluster(case, tmp_path: Path):
    for count, file in FILES.items():
        name = Path(file).stem
        (tmp_path / file).write_text(HARDWARE.format(name=name, count=count))
    spec = tmp_path / "run.llmspec"
    spec.write_text(calibrated.spec_text(case, 12))
    program = dsl.load(spec)
    assert program.cluster.world_size == case.processes
    assert program.cluster.name == Path(FILES[case.processes]).stem
    assert program.train.steps == 12 and program.train.validate is None
    pinned = {one.key for one in program.plan}
    assert pinned == {pin.partition("=")[0].strip() for pin in case.pins.split(";") if pin}


def test_errors_and_the_page():
    result = Result(
        case="x",
        plan="data 2",
        predicted_step_s=0.9,
        measured_step_s=1.0,
        predicted_memory_bytes=120 * 2**20,
        measured_memory_bytes=100 * 2**20,
    )
    assert result.errors == (pytest.approx(-0.1), pytest.approx(0.2))
    row = "| x (over) | 900 ms | 1000 ms | -10.0 % | 120 MiB | 100 MiB | +20.0 % |"
    assert row in calibrated.table([result], 0.15)
    assert "(over)" not in calibrated.table([result], 0.25)
    known = {"date": "a day", "cores": 2, "machine": "x86_64", "torch": "2", "load": 0.1}
    assert "Median error 10.0 % of a step, 20.0 % of memory" in calibrated.page(
        [result], known, 0.15
    )
