"""Roles of a plan: processes of their own that run two steps of the emitted program on fake
tensors, each as the rank that it is told to be.

    python -m llmspec.compiler.dryrun.role TASK.json     prints what each saw, as a line of JSON
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import multiprocessing
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh

from llmspec.compiler.dryrun.experts import spread_evenly
from llmspec.compiler.dryrun.folding import Folding, NotAlike
from llmspec.compiler.dryrun.live import LiveBytes, resizes_seen, shapes_unseen
from llmspec.compiler.dryrun.places import Places
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

HEAVY = (
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch._dynamo",
    "torch.nn.attention",
)
"""What emitted programs import: once, before a process for each role is forked."""

NAMED = 40
"""Kinds of tensors alive at the peak that a role tells of, the largest first."""


def main(path: str) -> None:
    task = json.loads(Path(path).read_text())
    for name in HEAVY:
        importlib.import_module(name)
    each = partial(_told, task["folder"], task["mesh"], task["world"], task["whole"])
    again = partial(_told, task["folder"], task["mesh"], task["world"], True)
    context = multiprocessing.get_context("fork")
    with context.Pool(task["jobs"], maxtasksperchild=1) as pool:
        for rank, seen in zip(task["ranks"], pool.imap(each, task["ranks"]), strict=True):
            found = seen if seen is not None else pool.apply(again, (rank,))
            print(json.dumps(found), flush=True)


def _told(
    folder: str, sizes: dict[str, int], world: int, whole: bool, rank: int
) -> dict[str, Any] | None:
    """None where nothing can be folded."""
    try:
        return run(folder, sizes, rank, world, whole=whole)
    except NotAlike:
        return None
    except Exception:  # whatever the program raises is what the run has found
        return {"raised": traceback.format_exc()}


def run(
    folder: str, sizes: dict[str, int], rank: int, world: int, *, whole: bool = False
) -> dict[str, Any]:
    """whole: every micro-batch runs.

    What comes out: peak_bytes, peak_at (the operator), peak_place (its line), at_peak [operator,
    line, dtype, shape, bytes], resting_bytes (between two steps), collectives [kind, ranks, bytes,
    count] of one step, places (lines of each of those), counted (micro-batches that did not run).
    """
    logging.disable(logging.WARNING)
    _keep_mesh_real()
    dist.init_process_group("fake", rank=rank, world_size=world)
    sys.path.insert(0, folder)
    places = Places(folder)
    with recorded(places) as sent, ExitStack() as stack:
        spread_evenly()
        train = importlib.import_module("train")
        mesh = importlib.import_module("runtime.mesh").Mesh.create("cpu", **sizes)
        # values mean nothing here, and making them takes long
        initialise: Any = importlib.import_module("runtime.initialise")
        initialise.fill = lambda *rest, **more: None
        _share_tables()
        live = _live(places)
        second = _SecondStep(live, sent, Folding(live, sent, whole=whole))
        _replace_surroundings(train, mesh, second)
        _fold_pipeline(second.folding)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(resizes_seen(live))
        stack.enter_context(shapes_unseen(live))
        stack.enter_context(live)
        train.main.__wrapped__()
    return second.seen


def _live(places: Places) -> LiveBytes:
    if importlib.util.find_spec("runtime.host") is None:
        return LiveBytes(places=places)
    host = importlib.import_module("runtime.host")
    live = LiveBytes(is_host=host.is_host, places=places)
    live.watch_host(host)
    return live


def _share_tables() -> None:
    """The runtime keeps no fake tensors beyond their mode; here there is one mode to the end."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "runtime":
            for member in vars(module).values():
                if hasattr(member, "cache_info"):
                    member.__wrapped__ = member


def _fold_pipeline(folding: Folding) -> None:
    """An Executor is given the actions that run, where it has the whole list."""
    if importlib.util.find_spec("runtime.pipeline") is None:
        return
    pipeline: Any = importlib.import_module("runtime.pipeline")
    plain, begin = pipeline.Executor._play, pipeline._Step

    def begun(*args: Any, **kwargs: Any) -> Any:
        folding.step = begin(*args, **kwargs)
        return folding.step

    def play(executor: Any, batch: Any, actions: list[Any], **more: Any) -> Any:
        return plain(executor, batch, folding.actions(actions, executor.turns), **more)

    pipeline.Executor._play, pipeline._Step = play, begun


class _SecondStep:
    """Stands for the program's metrics: it is told when a step has ended, and ends the run after
    the second."""

    def __init__(self, live: LiveBytes, sent: Sent, folding: Folding):
        self.live, self.sent, self.folding = live, sent, folding
        self.resting, self.seen = 0, dict[str, Any]()

    def step(self, done: int, *rest: Any, **more: Any) -> bool:
        if done == 1:
            self.resting = self.live.now
            self.live.begin()
            self.sent.clear()
            self.folding.warming = False
            return False
        live, sent = self.live, self.sent
        if self.folding.counted and live.now != self.resting:
            raise NotAlike("the step ends with other bytes than it began with")
        self.seen = {
            "peak_bytes": live.peak,
            "peak_at": live.peak_at,
            "peak_place": live.peak_place.words,
            "at_peak": [
                [made.operator, made.place.words, made.dtype, made.shape, size]
                for made, size in live.at_peak().most_common(NAMED)
            ],
            "resting_bytes": self.resting,
            "collectives": [[*key, count] for key, count in sorted(sent.counted.items())],
            "places": [
                [*key, [place.words for place in places]]
                for key, places in sorted(sent.by_place.items())
            ],
            "counted": self.folding.counted,
        }
        return True

    def __getattr__(self, name: str) -> Any:
        return lambda *rest, **more: None


def _replace_surroundings(train: Any, mesh: Any, metrics: _SecondStep) -> None:
    """What the program has around its steps: processes, files, logs."""
    nothing = mock.MagicMock()
    nothing.restore.return_value = None
    data = _Data(train, mesh, metrics.folding)
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

    def __init__(self, train: Any, mesh: Any, folding: Folding):
        self.train, self.mesh, self.folding = train, mesh, folding

    def batch(self, step: int, rows: int, mesh: Any) -> _Batch:
        return _Batch(self.train, mesh, rows, self.folding)

    def take(self, first: int, rows: int, mesh: Any) -> _Batch:
        return _Batch(self.train, mesh, rows, self.folding)


class _Batch:
    def __init__(self, train: Any, mesh: Any, rows: int, folding: Folding):
        self.mesh, self.rows, self.folding = mesh, rows // mesh.data.size, folding
        self.tokens = train.SEQUENCE // mesh.context.size
        self.target_tokens = rows * train.SEQUENCE
        self.made = train.batches.MicroBatch

    def count(self, sequences: int) -> int:
        return self.rows // sequences

    def microbatches(self, count: int) -> Iterator[Any]:
        rows = self.rows // count
        in_turn = self.mesh.pipeline.size == 1
        every = ((i == 0, i == count - 1) for i in range(count))
        for first, last in self.folding.microbatches(count) if in_turn else every:
            ids = torch.zeros(rows, self.tokens, dtype=torch.int64)
            yield self.made(
                tokens_BT=ids,
                targets_BT=ids.clone(),
                samples_B=torch.zeros(rows, dtype=torch.int64),
                first=first,
                last=last,
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
