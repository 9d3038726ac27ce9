"""What a rank of an emitted pipeline really did in a step, in the words of plan.json.

Nothing here asks the executor which action it plays: stages are seen to be called, gradients to
arrive, messages to leave and come, parameters to be gathered and gradients to be summed.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SUMS = ("reduce_scatter", "allreduce")


class _Seen(TorchDispatchMode):
    """words: in the order in which things happened; a receive has its name when it is used.
    sent: to which pipeline rank each message went."""

    def __init__(self, executor: Any, micros: list[Any]):
        super().__init__()
        self.words: list[str] = []
        self.sent: list[tuple[str, int]] = []
        self.number = {tuple(micro.samples_B.tolist()): m for m, micro in enumerate(micros)}
        self.made: dict[int, str] = {}  # what a value is to who sends it, by its memory
        self.came: dict[int, int] = {}  # which word is its receive, by its memory
        self.queues: dict[int, tuple[int, int]] = {}  # products of a backward in two parts
        self.split_backward = sys.modules["runtime.split_backward"]
        self.kept: list[Tensor] = []  # so that no memory is used twice
        for stage, model in executor.stages.items():
            model.forward = self._stage(stage, model.forward)
        for stage, gradients in executor.gradients.items():
            self._watch(stage, gradients)

    def _stage(self, stage: int, forward: Any) -> Callable[..., Tensor]:
        def call(x: Tensor, targets: Tensor, samples: Tensor) -> Tensor:
            m = self.number[tuple(samples.tolist())]
            self._used(x, f"{stage}RECV_F{m}")
            self.words.append(f"{stage}F{m}")
            if stage:
                x.register_post_accumulate_grad_hook(lambda x: self._gives(x.grad, stage, "B", m))
            queue = self.split_backward._splitting.queue
            if queue is not None:
                self.queues[id(queue)] = stage, m
            out: Tensor = forward(x, targets, samples)
            self._gives(out, stage, "F", m)

            def arrived(gradient: Tensor) -> None:
                self._used(gradient, f"{stage}RECV_B{m}")
                self.words.append(f"{stage}{'B' if queue is None else 'I'}{m}")

            out.register_hook(arrived)
            return out

        return call

    def _gives(self, value: Tensor, stage: int, kind: str, m: int) -> None:
        self.kept.append(value.detach())
        self.made[value.data_ptr()] = f"{stage}SEND_{kind}{m}"

    def _used(self, value: Tensor, word: str) -> None:
        at = self.came.pop(value.data_ptr(), None)
        if at is not None:
            self.words[at] = word

    def transfer(self, operations: list[Any]) -> None:
        """What batch_isend_irecv is called with; two at once are a tied weight's gradient."""
        if len(operations) > 1:
            return
        (one,) = operations
        if one.op is dist.isend:
            word = self.made[one.tensor.data_ptr()]
            self.words.append(word)
            self.sent.append((word, dist.get_group_rank(one.group, one.peer)))
        else:
            self.kept.append(one.tensor)
            self.came[one.tensor.data_ptr()] = len(self.words)
            self.words.append("a receive that nobody has used")

    def _watch(self, stage: int, gradients: Any) -> None:
        gather, release, weights = gradients.gather, gradients.release, gradients.weights

        def gathered() -> None:
            self.words.append(f"{stage}UNSHARD")
            gather()

        def released() -> None:
            self.words.append(f"{stage}RESHARD")
            release()

        def later(products: list[Any]) -> None:
            of, m = self.queues[id(products)]
            assert of == stage and products, "a second part that has nothing to do"
            self.words.append(f"{stage}W{m}")
            weights(products)

        gradients.gather, gradients.release, gradients.weights = gathered, released, later

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented
        name = func._schema.name
        if name.startswith("c10d::") and any(s in name for s in SUMS):
            word = re.sub(r"[A-Z_]+\d*$", "REDUCE_GRAD", self.words[-1])
            if self.words[-1] != word:
                self.words.append(word)
        return func(*args, **(kwargs or {}))


@contextmanager
def _transfers(seen: _Seen) -> Iterator[None]:
    plain = dist.batch_isend_irecv

    def watched(operations: list[Any]) -> Any:
        seen.transfer(operations)
        return plain(operations)

    dist.batch_isend_irecv = watched
    try:
        yield
    finally:
        dist.batch_isend_irecv = plain


Done = tuple[int, list[str], list[tuple[str, int]]]
"""A process's pipeline rank, what it did, and to which pipeline rank each of its messages went."""


def executed(rank: int, folders: list[tuple[str, dict[str, int]]]) -> list[Done]:
    """Of each emitted program, what this process did in its second step. One process group plays
    them all."""
    return [_one(folder, sizes) for folder, sizes in folders]


def _one(folder: str, sizes: dict[str, int]) -> Done:
    for name in [m for m in sys.modules if m.split(".")[0] in ("runtime", "model", "train")]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    train = importlib.import_module("train")
    batches = importlib.import_module("runtime.batches")
    mesh = importlib.import_module("runtime.mesh").Mesh.create("cpu", **sizes)
    sys.path.remove(folder)
    assert Path(train.__file__ or "").parent == Path(folder)
    trainer = train.Trainer(mesh)
    data = batches.synthetic(sequence_length=train.SEQUENCE, vocab=train.VOCABULARY, seed=1)
    trainer.step(data.batch(0, train.BATCH, mesh))
    batch = data.batch(1, train.BATCH, mesh)
    micros = list(batch.microbatches(train.MICROBATCHES))
    seen = _Seen(trainer.executor, micros)
    with _transfers(seen), seen:
        trainer.step(batch)
    return mesh.pipeline.rank, seen.words, seen.sent
