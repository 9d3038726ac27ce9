"""`python -m bench.gpu`: all that only a GPU can tell, in one run; bench/METHOD.md says how.

Exit status 1 if a kernel, the loss or a program is not right.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.gpu.cases import CASES, tiny
from bench.gpu.emitted_kernels import emitted_kernels
from bench.gpu.emitting import language_name
from bench.gpu.kernels import LOSSES, TINY_LOSSES, Row, check_losses
from bench.gpu.landed import MODEL, check
from bench.gpu.measuring import Device, this_device
from bench.gpu.page import page
from bench.gpu.training import train

RESULTS = Path(__file__).parents[1] / "results"
LIMIT_S = 520.0
KERNELS_S = 120.0


def sections(
    device: Device, name: str, folder: Path, left_s: Callable[[], float], *, small: bool
) -> dict[str, Callable[[], list[Row]]]:
    cases = [tiny(c) if small else c for c in CASES]
    programs = [tiny(MODEL) if small else MODEL]
    # the kernels of a model's blocks are the same however many there are
    few = [c for c in cases if not c.fit]
    return {
        "loss": lambda: check_losses(TINY_LOSSES if small else LOSSES, device),
        "kernels": lambda: emitted_kernels(few, device, name, folder / "kernels", KERNELS_S),
        "landed": lambda: check(
            name, folder / "landed", cuda=device.kind == "cuda", case=programs[0]
        ),
        "training": lambda: [
            row for c in cases for row in train(c, device, name, folder / "training", left_s)
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="what a GPU does with emitted programs")
    parser.add_argument("--only", default="", help="sections, with commas between them")
    parser.add_argument("--gpu", help="what the language calls the device")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds for all of it")
    parser.add_argument("--tiny", action="store_true", help="sizes that test the benchmark itself")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu.json")
    options = parser.parse_args(arguments)
    start_s = time.perf_counter()
    device = this_device(options.tiny)
    name = f'gpu("{options.gpu}")' if options.gpu else language_name(device)
    results: dict[str, Any] = {"device": asdict(device), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        every = sections(
            device,
            name,
            Path(folder),
            lambda: options.limit - (time.perf_counter() - start_s),
            small=options.tiny,
        )
        for section in options.only.split(",") if options.only else every:
            results[section] = every[section]()
            gc.collect()
            if device.kind == "cuda":
                torch.cuda.empty_cache()  # what follows runs in processes of its own
            print(f"{section}: {time.perf_counter() - start_s:.0f} s", file=sys.stderr, flush=True)
    results["seconds"] = time.perf_counter() - start_s
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    text = page(results)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    checked = [row for s in ("loss", "kernels", "landed") for row in results.get(s, ())]
    return 0 if all(row["right"] for row in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
