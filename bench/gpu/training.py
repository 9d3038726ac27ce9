"""Models of real size: the emitted program beside what people train them with, and beside what was
predicted of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from bench.gpu.cases import Case, spec_text
from bench.gpu.contestants import COMPILED_KERNELS, EMITTED, WITH_KERNELS, contestants, run
from bench.gpu.emitting import emit
from bench.gpu.kernels import words_of
from bench.gpu.measuring import Device
from bench.gpu.processes import Row

LONGEST_S = 150.0
"""Of one contestant, its compilation and start among them."""
SHORTEST_S = 20.0
"""Below that it is not begun."""
EMITTED_WAYS = {WITH_KERNELS: "triton", COMPILED_KERNELS: "inductor"}
"""Besides what the search takes: what their plans have under `kernels`."""
FIT_SHARE = 0.8
"""Of the memory, for the model of as many layers as fit: so that others fit, too."""


def train(
    case: Case, device: Device, name: str, folder: Path, left_s: Callable[[], float]
) -> Iterator[Row]:
    """One row a contestant. `name`: of the device in the language; `left_s`: for this case."""
    precision = "bf16" if device.kind == "cuda" else "fp32"
    case, known = fitted(case, name, precision, folder, device)
    if not known["fits"]:
        yield {"case": case.name, "who": EMITTED, "failed": "no plan fits"}
        return
    cuda = device.kind == "cuda"
    programs = {EMITTED: (folder / case.name, known)}
    for who, kernels in EMITTED_WAYS.items():
        if known["kernels"] != kernels and (cuda or kernels != "inductor"):
            own = folder / f"{case.name}_{kernels}"
            own.mkdir(parents=True)
            pins = f"recompute = none; offload = none; kernels = {kernels}"
            text = spec_text(case, name, precision=precision, pins=pins)
            try:
                programs[who] = own, emit(text, own)
            except Exception as error:  # of any kind: the others are still to be measured
                yield {"case": case.name, "who": who, "failed": words_of(error)}
    # what takes part only out of interest comes when all else is known
    order = [*programs, *contestants(case, cuda)]
    for who in sorted(order, key=lambda who: who == COMPILED_KERNELS):
        own, predicted = programs.get(who, (folder, known))
        seconds = min(LONGEST_S, left_s())
        if seconds < SHORTEST_S:
            yield {"case": case.name, "who": who, "failed": "no time left for it"}
            continue
        yield _row(case, who, run(who, case, own / "program", seconds), predicted, device)


def fitted(case: Case, name: str, precision: str, folder: Path, device: Device) -> tuple[Case, Row]:
    """With as many layers as a share of the memory holds, its program, and what its plan
    predicts."""
    own = folder / case.name
    own.mkdir(parents=True, exist_ok=True)
    limit = int(FIT_SHARE * device.memory_bytes) if case.fit else None

    def with_layers(count: int, *, write: bool = False) -> tuple[Case, Row]:
        tried = replace(case, shape=replace(case.shape, layers=count))
        text = spec_text(tried, name, precision=precision, memory_bytes=limit)
        return tried, emit(text, own, write=write)

    if not case.fit:
        return with_layers(case.shape.layers, write=True)
    fits, too_many = 0, case.shape.layers + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if with_layers(middle)[1]["fits"]:
            fits = middle
        else:
            too_many = middle
    return with_layers(max(fits, 1), write=True)


def _row(case: Case, who: str, found: Row, known: Row, device: Device) -> Row:
    """mfu: of the dense peak that the data sheet gives; of_product: of what a product reached."""
    row = {"case": case.name, "who": who, "layers": case.shape.layers, **found}
    if "failed" in found:
        return row
    per_s = case.tokens / found["step_s"]
    row["tokens_per_s"] = per_s
    row["mfu"] = per_s * known["model"]["flops_per_token"] / known["peak_flops"]
    row["of_product"] = per_s * known["model"]["flops_per_token"] / device.flops
    if who.startswith(EMITTED):
        row["predicted_s"] = known["predicted"]["step_time_s"]
        parts = known["predicted"]["memory_bytes"]
        row["predicted_bytes"] = sum(v for k, v in parts.items() if k != "fixed")
    return row


def ratios(rows: list[Row]) -> None:
    """Of every one's time and memory to those of the faster of the emitted programs of its case."""
    done = [row for row in rows if "step_s" in row]
    for row in done:
        own = [r for r in done if r["case"] == row["case"] and r["who"].startswith(EMITTED)]
        if not own:
            continue
        best = min(own, key=lambda r: float(r["step_s"]))
        row["time_ratio"] = row["step_s"] / best["step_s"]
        if best["peak_bytes"]:
            row["memory_ratio"] = row["peak_bytes"] / best["peak_bytes"]
