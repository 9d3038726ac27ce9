"""Every kernel of one emitted program, in a process of its own, for what it imports stays:
`python -m bench.gpu.emitted_kernels FOLDER DEVICE`. The last line of the output is the rows."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from bench.gpu.cases import Case, spec_text
from bench.gpu.contestants import in_process
from bench.gpu.emitting import emit
from bench.gpu.kernels import Recorder, Row, check_kernels
from bench.gpu.measuring import Device


def emitted_kernels(
    cases: list[Case], device: Device, name: str, folder: Path, timeout_s: float
) -> list[Row]:
    """Of the programs of some models, whatever their plans say of kernels."""
    precision = "bf16" if device.kind == "cuda" else "fp32"
    rows: list[Row] = []
    for case in cases:
        own = folder / case.name
        own.mkdir(parents=True)
        emit(spec_text(case, name, precision=precision), own, kernels="triton")
        found = in_process(
            "bench.gpu.emitted_kernels",
            [str(own / "program"), json.dumps(asdict(device))],
            timeout_s,
        )
        if isinstance(found, dict):  # it failed
            rows.append({"name": f"kernels of {case.name}", "right": False, **found})
        else:
            rows += [{"case": case.name, **row} for row in found]
    return rows


def of_program(folder: str, device: Device) -> list[Row]:
    sys.path.insert(0, folder)
    if not Path(folder, "kernels.py").exists():
        return []
    train = importlib.import_module("train")
    mesh = importlib.import_module("runtime.mesh").start()
    trainer = train.Trainer(mesh)
    data = importlib.import_module("runtime.batches").synthetic(
        sequence_length=train.SEQUENCE, vocab=train.VOCABULARY, seed=train.SEED
    )
    with Recorder() as seen:
        trainer.step(data.batch(0, train.BATCH, mesh))
    rows = check_kernels(seen.calls, importlib.import_module("kernels"), device)
    mesh.close()
    return rows


if __name__ == "__main__":
    print(json.dumps(of_program(sys.argv[1], Device(**json.loads(sys.argv[2])))))
