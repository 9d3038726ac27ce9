"""One role of a plan: a process of its own that runs two steps of the emitted program on fake
tensors, as the rank that it is told to be.

    python -m llmspec.compiler.dryrun.role TASK.json     prints what it saw, as JSON
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from llmspec.compiler.dryrun.experts import spread_evenly
from llmspec.compiler.dryrun.live import LiveBytes, resizes_seen
from llmspec.compiler.dryrun.sent import Sent, recorded

BOOKKEEPING = (
    "__init__",
    "__getitem__",
    "_concatenate",
    "_flatten",
    "_get_mesh_tensor_from_full_mesh",
    "get_local_rank",
)
"""Methods of DeviceMesh that compute with rank numbers, which must be real; some are private and
not there in every version of torch."""


def main(path: str) -> None:
    task = json.loads(Path(path).read_text())
    json.dump(run(task["folder"], task["mesh"], task["rank"], task["world"]), sys.stdout)


def run(folder: str, sizes: dict[str, int], rank: int, world: int) -> dict[str, Any]:
    """peak_bytes, peak_at (the operator), resting_bytes (between two steps), collectives
    [kind, ranks, bytes, count] of one step."""
    logging.disable(logging.WARNING)
    _keep_mesh_real()
    dist.init_process_group("fake", rank=rank, world_size=world)
    sys.path.insert(0, folder)
    with recorded() as sent:
        spread_evenly()
        train = importlib.import_module("train")
        mesh = importlib.import_module("runtime.mesh").Mesh.create("cpu", **sizes)
        # values mean nothing here, and making them takes long
        initialise: Any = importlib.import_module("runtime.initialise")
        initialise.fill = lambda *rest, **more: None
        _share_tables()
        live = LiveBytes()
        second = _SecondStep(live, sent)
        _replace_surroundings(train, mesh, second)
        with FakeTensorMode(allow_non_fake_inputs=True), resizes_seen(live), live:
            train.main.__wrapped__()
    return second.seen


def _share_tables() -> None:
    """The runtime keeps no fake tensors beyond their mode; here there is one mode to the end."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "runtime":
            for member in vars(module).values():
                if hasattr(member, "cache_info"):
                    member.__wrapped__ = member


class _SecondStep:
    """Stands for the program's metrics: it is told when a step has ended, and ends the run after
    the second."""

    def __init__(self, live: LiveBytes, sent: Sent):
        self.live, self.sent = live, sent
        self.resting, self.seen = 0, dict[str, Any]()

    def step(self, done: int, *rest: Any, **more: Any) -> bool:
        if done == 1:
            self.resting = self.live.now
            self.live.peak, self.live.peak_at = 0, ""
            self.sent.clear()
            return False
        self.seen = {
            "peak_bytes": self.live.peak,
            "peak_at": self.live.peak_at,
            "resting_bytes": self.resting,
            "collectives": [[*key, count] for key, count in sorted(self.sent.items())],
        }
        return True

    def __getattr__(self, name: str) -> Any:
        return lambda *rest, **more: None


def _replace_surroundings(train: Any, mesh: Any, metrics: _SecondStep) -> None:
    """What the program has around its steps: processes, files, logs."""
    nothing = mock.MagicMock()
    nothing.restore.return_value = None
    data = _Data(train, mesh)
    train.STEPS = 3
    train.start = lambda **sizes: mesh
    train.Checkpoints = lambda *rest, **more: nothing
    train.Metrics = lambda *rest, **more: metrics
    if hasattr(train, "RAMP"):
        train.RAMP = ()  # steps of the final size
    if hasattr(train, "LossScale"):
        train.LossScale.accepts = lambda scale, norm: True  # a fake norm has no value to judge by
    for name in ("text", "tokens", "synthetic"):
        setattr(train.batches, name, lambda *rest, **more: data)


class _Data:
    """What a dataset of runtime.batches gives, of zeros."""

    def __init__(self, train: Any, mesh: Any):
        self.train, self.mesh = train, mesh

    def batch(self, step: int, rows: int, mesh: Any) -> _Batch:
        return _Batch(self.train, mesh, rows)

    def take(self, first: int, rows: int, mesh: Any) -> _Batch:
        return _Batch(self.train, mesh, rows)


class _Batch:
    def __init__(self, train: Any, mesh: Any, rows: int):
        self.mesh, self.rows = mesh, rows // mesh.data.size
        self.tokens = train.SEQUENCE // mesh.context.size
        self.target_tokens = rows * train.SEQUENCE
        self.made = train.batches.MicroBatch

    def count(self, sequences: int) -> int:
        return self.rows // sequences

    def microbatches(self, count: int) -> Iterator[Any]:
        rows = self.rows // count
        for i in range(count):
            ids = torch.zeros(rows, self.tokens, dtype=torch.int64)
            yield self.made(
                tokens_BT=ids,
                targets_BT=ids.clone(),
                samples_B=torch.zeros(rows, dtype=torch.int64),
                first=i == 0,
                last=i == count - 1,
            )


def _keep_mesh_real() -> None:
    for name in BOOKKEEPING:
        plain = DeviceMesh.__dict__.get(name)
        if plain is None:
            continue
        static = isinstance(plain, staticmethod)
        wrapped = _on_real_tensors(plain.__func__ if static else plain)
        setattr(DeviceMesh, name, staticmethod(wrapped) if static else wrapped)


def _on_real_tensors(plain: Any) -> Any:
    def real(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return plain(*args, **kwargs)

    return real


if __name__ == "__main__":
    main(sys.argv[1])
