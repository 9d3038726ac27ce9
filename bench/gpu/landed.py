"""What else has landed, run for a few steps by torchrun on this device, and its losses compared."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.gpu.cases import Case, spec_text
from bench.gpu.emitting import emit
from bench.gpu.kernels import words_of
from bench.gpu.processes import Row, rows_of_command
from bench.plain_trainers import Shape

STEPS = 6
SIDE_BY_SIDE = 5
NO_TIME = "no time left for it"
LONGEST_S, SHORTEST_S = 80.0, 10.0
"""Of one program; below the second it is not begun."""
MODEL = Case(
    name="landed",
    model="llama",
    shape=Shape(layers=4, width=512, heads=8, kv_heads=4, ffn=1408, vocab=32_000, context=512),
    batch=8,
)


@dataclass(frozen=True, slots=True)
class Variant:
    """within: of the losses of plain steps in the same type of weights, relative."""

    name: str
    precision: str
    pins: str
    within: float


PLAIN = Variant("plain", "bf16", "recompute = none", 0.0)
VARIANTS = (
    Variant("fp32", "fp32", "recompute = none", 2e-2),
    Variant("fused kernels", "bf16", "recompute = none; kernels = triton", 5e-3),
    Variant("kernels by inductor", "bf16", "recompute = none; kernels = inductor", 5e-3),
    Variant("offload optimizer", "bf16", "recompute = none; offload = optimizer", 5e-3),
    Variant("offload activations", "bf16", "recompute = none; offload = activations", 1e-3),
    Variant("fp16 with its loss scale", "fp16", "recompute = none", 1e-2),
    Variant("bf16 without masters", "bf16(master=none)", "recompute = none", 2e-2),
    Variant("recompute full", "bf16", "recompute = full", 1e-3),
    Variant("recompute swiglu and norms", "bf16", "recompute = [swiglu, rmsnorm]", 1e-3),
)
ON_CPUS = (Variant("recompute full", "fp32", "recompute = full", 1e-6),)


def check(
    device: str,
    folder: Path,
    left_s: Callable[[], float],
    *,
    cuda: bool,
    case: Case = MODEL,
) -> Iterator[Row]:
    """One row a variant; `right` when its losses are those of the plain program. On a GPU several
    run side by side: nothing here is timed."""
    plain = PLAIN if cuda else Variant("plain", "fp32", "recompute = none", 0.0)
    emitted = [_emitted(case, v, device, folder) for v in (plain, *(VARIANTS if cuda else ON_CPUS))]
    with ThreadPoolExecutor(SIDE_BY_SIDE if cuda else 1) as pool:
        found = [pool.submit(_measured, *one, left_s) for one in emitted]
        wanted: list[float] | None = None
        for (row, _), made in zip(emitted, found, strict=True):
            row |= made.result()
            losses = row.pop("losses", None)
            wanted = wanted or losses
            if wanted and losses:
                pairs = zip(losses, wanted, strict=True)
                row["distance"] = max(abs(a - b) / abs(b) for a, b in pairs)
            if row.get("failed") != NO_TIME:
                row["right"] = row.get("distance", math.inf) <= row["allowed"]
            yield row


def _emitted(case: Case, variant: Variant, device: str, folder: Path) -> tuple[Row, Path]:
    """The variant's row, and where its program is."""
    row: Row = {"name": variant.name, "allowed": variant.within}
    own = folder / variant.name.replace(" ", "_")
    own.mkdir(parents=True)
    text = spec_text(case, device, precision=variant.precision, pins=variant.pins, steps=STEPS)
    try:
        if not emit(text, own)["fits"]:
            row["failed"] = "no plan fits"
    except Exception as error:  # of any kind: the others are still to be looked at
        row["failed"] = words_of(error)
    return row, own / "program"


def _measured(row: Row, program: Path, left_s: Callable[[], float]) -> Row:
    """Its losses; on a GPU its peak of tensors, beside the plan's."""
    if "failed" in row:
        return {}
    if left_s() < SHORTEST_S:
        return {"failed": NO_TIME}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "1", str(program / "train.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for failed in rows_of_command(command, environment, min(left_s(), LONGEST_S)):
        return failed
    rows = [json.loads(line) for line in (program / "log.jsonl").read_text().splitlines()]
    found: Row = {"losses": [row["loss"] for row in rows if "loss" in row]}
    if torch.cuda.is_available() and "measured_memory_bytes" in rows[-1]:
        found["peak_bytes"] = rows[-1]["measured_memory_bytes"]
        found["predicted_bytes"] = rows[-1]["predicted_memory_bytes"]
    return found
