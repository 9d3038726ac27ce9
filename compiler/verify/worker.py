"""One rank of a verification: runs the emitted program's step in float64 and saves what it
computed.

Lives in a forked process; imports nothing but the emitted directory.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """folder: the emitted program. dtype: what everything is computed in; None: as emitted.

    mesh: axis sizes by name. clip: the norm that gradients are clipped to after they are compared.
    rows: sequences of the step, if not the program's BATCH.
    """

    folder: str
    world: int
    mesh: dict[str, int]
    dtype: torch.dtype | None
    clip: float
    seed: int
    threads: int = 1
    rows: int | None = None


def run_rank(task: Task, rank: int, store: str, results: str) -> None:
    """Run one rank; write `rank{n}.pt`, or `rank{n}.error` with the traceback."""
    try:
        out = _run(task, rank, store)
        torch.save(out, f"{results}/rank{rank}.part")
        os.replace(f"{results}/rank{rank}.part", f"{results}/rank{rank}.pt")
        _wait_for_all(task.world, results)
    except BaseException:
        Path(f"{results}/rank{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def _wait_for_all(world: int, results: str, patience_s: float = 120.0) -> None:
    """A rank that ends closes its connections, which others may still be reading."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        ended = [Path(f"{results}/rank{r}{end}") for r in range(world) for end in (".pt", ".error")]
        if sum(p.exists() for p in ended) >= world:
            return
        time.sleep(0.01)


def _run(task: Task, rank: int, store: str) -> dict[str, Any]:
    torch.set_num_threads(task.threads)
    # gathering whole gradients for the comparison is not the program's own traffic
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    sys.path.insert(0, task.folder)
    for name in [
        m for m in sys.modules if m.split(".")[0] in ("runtime", "kernels", "model", "train")
    ]:
        del sys.modules[name]
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, task.world), rank=rank, world_size=task.world
    )
    modules = {n: importlib.import_module(n) for n in ("runtime.parameters", "model", "train")}
    _set_types(modules, task.dtype)
    mesh = importlib.import_module("runtime.mesh").Mesh.create("cpu", **task.mesh)
    trainer = modules["train"].Trainer(mesh)
    batches = importlib.import_module("runtime.batches")
    train = modules["train"]
    data = batches.synthetic(sequence_length=train.SEQUENCE, vocab=train.VOCABULARY, seed=task.seed)
    rows = task.rows or train.BATCH
    batch = data.batch(0, rows, mesh)
    out: dict[str, Any] = {"coordinates": {a: getattr(mesh, a).rank for a in task.mesh}}
    out["parameters"] = _whole(trainer.models, gradients=False)
    out["loss"] = trainer.step(batch).double().cpu()
    if (Path(task.folder) / "runtime/auxiliary.py").exists():
        inner = importlib.import_module("runtime.auxiliary")
        out["inner"] = inner.parts("balance_loss", "z_loss", device=mesh.device)
    scale = trainer.scale.value if hasattr(trainer, "scale") else 1.0
    out["gradients"] = _whole(trainer.models, gradients=True, scale=scale)
    out["norm"] = trainer.clip(task.clip).double().cpu()
    out["clipped"] = _whole(trainer.models, gradients=True)
    out["tokens"] = data.read(torch.arange(rows))
    return out


def _set_types(modules: dict[str, Any], dtype: torch.dtype | None) -> None:
    """Everything in one type: what the program stores, computes in and reduces in."""
    if dtype is None:
        return
    modules["runtime.parameters"].parameter.__kwdefaults__["dtype"] = dtype
    for module in (modules["model"], modules["train"]):
        for constant in ("COMPUTE", "REDUCE", "STORED"):
            if hasattr(module, constant):
                setattr(module, constant, dtype)


def _whole(models: list[Any], *, gradients: bool, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Every parameter (or its gradient) by name, put together from all ranks that hold a part.

    scale: what the loss was multiplied with.
    """
    from torch.distributed.tensor import DTensor

    out: dict[str, torch.Tensor] = {}
    for model in models:
        for name, parameter in model.named_parameters():
            value = parameter.grad if gradients else parameter
            if value is None:
                raise RuntimeError(f"{name} got no gradient")
            value = value.detach()
            out[name] = (value.full_tensor() if isinstance(value, DTensor) else value) / scale
    return out
