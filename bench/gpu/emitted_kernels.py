"""Every kernel of one emitted program, in a process of its own, for what it imports stays:
`python -m bench.gpu.emitted_kernels FOLDER DEVICE`. It says a row as soon as it knows it."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from bench.gpu.cases import Case, spec_text
from bench.gpu.emitting import emit
from bench.gpu.kernels import Recorder, check_kernels, words_of
from bench.gpu.measuring import Device
from bench.gpu.processes import Row, rows_of, rows_of_command, say


def emitted_kernels(
    cases: list[Case], device: Device, name: str, folder: Path, left_s: Callable[[], float]
) -> Iterator[Row]:
    """Of the programs of some models, whatever their plans say of kernels."""
    precision = "bf16" if device.kind == "cuda" else "fp32"
    for number, case in enumerate(cases):
        own = folder / case.name
        own.mkdir(parents=True)
        try:
            emit(spec_text(case, name, precision=precision), own, kernels="triton")
        except Exception as error:  # of any kind: the other programs are still to be looked at
            yield {"case": case.name, "name": "emitting", "right": False} | {
                "failed": words_of(error)
            }
            continue
        share_s = left_s() / (len(cases) - number)
        if device.kind == "cuda":
            yield {"case": case.name, **own_test(own / "program", share_s / 2)}
        arguments = [str(own / "program"), json.dumps(asdict(device))]
        found = list[str]()
        for row in rows_of("bench.gpu.emitted_kernels", arguments, share_s):
            if "name" not in row:  # it did not end well
                row = {"name": "all of them", "right": bool(found), **row}
            found.append(row["name"])
            yield {"case": case.name, **row}
        if not found:
            yield {"case": case.name, "name": "all of them", "right": False, "failed": "none seen"}


def own_test(program: Path, timeout_s: float) -> Row:
    """The test that the program carries: odd shapes, both passes, float32 against float64."""
    command = [sys.executable, str(program / "test_kernels.py")]
    environment = os.environ | {"PYTHONPATH": str(program)}
    found = list(rows_of_command(command, environment, timeout_s))
    return {"name": "test_kernels.py", "right": not found, **(found[0] if found else {})}


def of_program(folder: str, device: Device) -> Iterator[Row]:
    sys.path.insert(0, folder)
    train = importlib.import_module("train")
    mesh = importlib.import_module("runtime.mesh").start()
    trainer = train.Trainer(mesh)
    data = importlib.import_module("runtime.batches").synthetic(
        sequence_length=train.SEQUENCE, vocab=train.VOCABULARY, seed=train.SEED
    )
    with Recorder() as seen:
        trainer.step(data.batch(0, train.BATCH, mesh))
    yield from check_kernels(seen.calls, importlib.import_module("kernels"), device)
    mesh.close()


if __name__ == "__main__":
    for found in of_program(sys.argv[1], Device(**json.loads(sys.argv[2]))):
        say(found)
