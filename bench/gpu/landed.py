"""What else has landed, run for a few steps by torchrun on this device, and its losses compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu.cases import Case, spec_text
from bench.gpu.emitting import emit
from bench.plain_trainers import Shape
from llmspec.compiler.errors import Refused
from llmspec.dsl import SpecError

STEPS = 6
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
    Variant("recompute full", "bf16", "recompute = full", 1e-3),
    Variant("recompute swiglu and norms", "bf16", "recompute = [swiglu, rmsnorm]", 1e-3),
    Variant("offload optimizer", "bf16", "recompute = none; offload = optimizer", 5e-3),
    Variant("offload activations", "bf16", "recompute = none; offload = activations", 1e-3),
    Variant("fp16 with its loss scale", "fp16", "recompute = none", 1e-2),
    Variant("bf16 without masters", "bf16(master=none)", "recompute = none", 2e-2),
)
ON_CPUS = (Variant("recompute full", "fp32", "recompute = full", 1e-6),)


def check(device: str, folder: Path, *, cuda: bool, case: Case = MODEL) -> list[dict[str, Any]]:
    """One row a variant; `right` when its losses are those of the plain program."""
    plain = PLAIN if cuda else Variant("plain", "fp32", "recompute = none", 0.0)
    wanted = _losses(case, plain, device, folder)
    rows: list[dict[str, Any]] = [{"name": f"torchrun, {plain.precision}", **wanted}]
    rows[0]["right"] = "failed" not in wanted
    for variant in VARIANTS if cuda else ON_CPUS:
        found = _losses(case, variant, device, folder)
        right = "failed" not in found and rows[0]["right"]
        if right:
            pairs = zip(found["losses"], wanted["losses"], strict=True)
            found["distance"] = max(abs(a - b) / abs(b) for a, b in pairs)
            right = found["distance"] <= variant.within
        rows.append({"name": variant.name, "allowed": variant.within, "right": right, **found})
    return rows


def _losses(case: Case, variant: Variant, device: str, folder: Path) -> dict[str, Any]:
    own = folder / variant.name.replace(" ", "_")
    own.mkdir(parents=True)
    text = spec_text(case, device, precision=variant.precision, pins=variant.pins, steps=STEPS)
    try:
        known = emit(text, own)
    except (Refused, SpecError) as error:
        return {"failed": str(error)[-300:]}
    if not known["fits"]:
        return {"failed": "no plan fits"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "1", str(own / "program" / "train.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        return {"failed": done.stderr.strip()[-600:]}
    log = (own / "program" / "log.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, log) if "loss" in row]
    return {"losses": losses}
