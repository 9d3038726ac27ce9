"""The verb that measures kernels: tune."""

from __future__ import annotations

import os
from argparse import Namespace
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llmspec.compiler.cli.calibrating import cannot_name, cannot_write, progress
from llmspec.compiler.cli.console import (
    DIAGNOSTICS,
    OK,
    fault,
    product,
    product_json,
    status,
)

if TYPE_CHECKING:
    from llmspec.dsl.tuned import TunedKernel, TunedPass


def tune(options: Namespace) -> int:
    from llmspec.compiler import driver  # loads the whole compiler
    from llmspec.compiler.calibrate.run import CalibrationFailed
    from llmspec.compiler.tune import run
    from llmspec.compiler.tune.file import with_tuned

    session = driver.open_session(options.spec, train=options.train, trust=options.trust)
    path = Path(options.path)
    refused = cannot_measure() or cannot_write(path, force=True) or cannot_name(path.stem)
    if refused:
        return fault(*refused)
    try:
        before = path.read_text() if path.exists() else ""
        with_tuned(before, str(path), path.stem, [], [])  # faults are known before it is measured
        with progress() as tell:
            found = run.tune(session, run.Effort(), tell)
    except run.NothingToTune as error:
        return fault(str(error))
    except CalibrationFailed as error:
        status("Failed", "the process that measured stopped")
        product(str(error))
        return DIAGNOSTICS
    path.write_text(with_tuned(before, str(path), path.stem, found, in_words(options.spec)))
    if options.json:
        kernels = [as_data(k) for k in found]
        product_json({"schema": 1, "written": str(path), "name": path.stem, "kernels": kernels})
    else:
        product("\n".join(line for k in found for line in summary(k)))
    status(
        "Wrote",
        f'{path}. In a spec: import "{path.name}", and kernels = {path.stem} in its cluster',
    )
    return OK


def cannot_measure() -> tuple[str, ...]:
    import torch

    if not torch.cuda.is_available():
        return (
            "PyTorch finds no GPU here, and tiles are measured on the GPU that will use them",
            "run it on the machine that will train; without it, tiles are by rule",
        )
    if find_spec("triton") is None:
        return "Triton is not installed, and kernels are measured in it", "pip install triton"
    return ()


def in_words(spec: str) -> list[str]:
    import torch
    import triton

    device = torch.cuda.get_device_name()
    return [
        f"Measured by `llmspec tune {os.path.basename(spec)}` on {date.today()}: {device};",
        f"torch {torch.__version__}, triton {triton.__version__}.",
    ]


def summary(kernel: TunedKernel) -> list[str]:
    lines = [f"{kernel.name}, {kernel.columns} columns: {kernel.use}"]
    for word, one in kernel.directions:
        lines.append(f"  {word:<9} {one.rows} x {one.columns}, {one.warps} warps: {one.words}")
    return lines


def as_data(kernel: TunedKernel) -> dict[str, object]:
    def one(found: TunedPass | None) -> dict[str, object] | None:
        if found is None:
            return None
        return {
            "tile": [found.rows, found.columns],
            "warps": found.warps,
            "stages": found.stages,
            "bytes_per_s": found.rate,
            "by_rule_bytes_per_s": found.by_rule,
            "eager_bytes_per_s": found.eager,
        }

    return {
        "name": kernel.name,
        "columns": kernel.columns,
        "bytes": kernel.width,
        "structure": kernel.structure,
        "use": kernel.use,
        "forward": one(kernel.forward),
        "backward": one(kernel.backward),
    }
