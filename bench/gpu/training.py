"""Models of real size: the emitted program beside what people train them with, and beside what was
predicted of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.gpu.cases import Case, spec_text
from bench.gpu.contestants import EMITTED, WITH_KERNELS, contestants, run
from bench.gpu.emitting import emit
from bench.gpu.measuring import Device

LONGEST_S = 150.0
"""Of one contestant, its compilation and start among them."""
SHORTEST_S = 20.0
"""Below that it is not begun."""
Row = dict[str, Any]


def train(
    case: Case, device: Device, name: str, folder: Path, left_s: Callable[[], float]
) -> list[Row]:
    """One row a contestant. `name`: of the device in the language; `left_s`: of the whole run."""
    precision = "bf16" if device.kind == "cuda" else "fp32"
    case, known = fitted(case, name, precision, folder)
    if not known["fits"]:
        return [{"case": case.name, "who": EMITTED, "failed": "no plan fits"}]
    programs = {EMITTED: folder / case.name}
    if known["kernels"] == "eager":
        programs[WITH_KERNELS] = folder / f"{case.name}_kernels"
        programs[WITH_KERNELS].mkdir()
        emit(spec_text(case, name, precision=precision), programs[WITH_KERNELS], kernels="triton")
    rows = []
    for who in (*programs, *contestants(device.kind == "cuda")):
        seconds = min(LONGEST_S, left_s())
        if seconds < SHORTEST_S:
            rows.append({"case": case.name, "who": who, "failed": "no time left for it"})
            continue
        found = run(who, case, programs.get(who, folder) / "program", seconds)
        rows.append(_row(case, who, found, known, device))
    _ratios(rows)
    return rows


def fitted(case: Case, name: str, precision: str, folder: Path) -> tuple[Case, Row]:
    """With as many layers as there is memory for, and what its plan predicts."""
    own = folder / case.name
    own.mkdir(parents=True, exist_ok=True)

    def with_layers(count: int) -> tuple[Case, Row]:
        tried = replace(case, shape=replace(case.shape, layers=count))
        return tried, emit(spec_text(tried, name, precision=precision), own)

    if not case.fit:
        return with_layers(case.shape.layers)
    fits, too_many = 0, case.shape.layers + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if with_layers(middle)[1]["fits"]:
            fits = middle
        else:
            too_many = middle
    return with_layers(max(fits, 1))


def _row(case: Case, who: str, found: Row, known: Row, device: Device) -> Row:
    row = {"case": case.name, "who": who, "layers": case.shape.layers, **found}
    if "failed" in found:
        return row
    per_s = case.tokens / found["step_s"]
    row["tokens_per_s"] = per_s
    row["mfu"] = per_s * known["model"]["flops_per_token"] / device.flops
    if who == EMITTED:
        row["predicted_s"] = known["predicted"]["step_time_s"]
        parts = known["predicted"]["memory_bytes"]
        row["predicted_bytes"] = sum(v for k, v in parts.items() if k != "fixed")
    return row


def _ratios(rows: list[Row]) -> None:
    """Of every other's time and memory to the emitted program's."""
    own = next((r for r in rows if r["who"] == EMITTED and "failed" not in r), None)
    for row in rows:
        if own is not None and "failed" not in row:
            row["time_ratio"] = row["step_s"] / own["step_s"]
            if own["peak_bytes"]:
                row["memory_ratio"] = row["peak_bytes"] / own["peak_bytes"]
