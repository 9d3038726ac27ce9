"""Bytes of live tensors while an emitted program really runs, on forked gloo ranks.

`measure(session, plan)` emits the plan at its own size (write small specs), runs two optimizer
steps of it on synthetic data, and watches the second: every storage that an operator makes is held
by a weak reference, and what is alive is summed up after each operator. What a kernel allocates and
frees by itself, and the buffers of gloo, are not seen.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from llmspec.compiler.driver import Session, compile_plan
from llmspec.compiler.plan import Plan
from llmspec.compiler.verify.run import mesh_sizes
from tests.processes import run


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Bytes of one rank. `resting`: between two steps (weights, moments, and gradients if they
    stay); `forward`: alive when the step's first backward begins; `peak`: the most at once. What
    stands for host memory is not the device's: `host`, the most at once.
    """

    resting: int
    forward: int
    peak: int
    host: int = 0


class LiveBytes(TorchDispatchMode):
    """Inside it, `peak` is the most bytes of distinct storages alive at once.

    start: tensors that were there before. Storages that are resized count as they are.
    host: the program's module of that name, which knows what is not the device's.
    """

    def __init__(self, start: Iterable[torch.Tensor] = (), host: Any = None):
        super().__init__()
        self.host, self.host_peak = host, 0
        self.storages: dict[int, weakref.ref[Any]] = {}
        self.peak = 0
        for tensor in start:
            self._see(tensor)

    def _see(self, tensor: torch.Tensor) -> None:
        if type(tensor).__name__ == "DTensor":
            tensor = tensor._local_tensor  # type: ignore[attr-defined]
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = weakref.ref(storage)

    def now(self) -> int:
        total, away, dead = 0, 0, []
        for key, reference in self.storages.items():
            storage = reference()
            if storage is None:
                dead.append(key)
            elif self.host is not None and self.host.is_host(storage):
                away += storage.nbytes()
            else:
                total += storage.nbytes()
        for key in dead:
            del self.storages[key]
        self.peak, self.host_peak = max(self.peak, total), max(self.host_peak, away)
        return total

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        self.now()
        return out


@dataclass(slots=True)
class _Trace:
    forward: int = 0
    live: LiveBytes = field(default_factory=LiveBytes)


@contextmanager
def _first_backward(trace: _Trace) -> Iterator[None]:
    """Notes what is alive as the first backward begins."""
    real = torch.autograd.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        trace.forward = trace.forward or trace.live.now()
        real(*args, **kwargs)

    torch.autograd.backward = backward  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.backward = real  # type: ignore[assignment]


def _tensors(trainer: Any, optimizer: Any) -> list[torch.Tensor]:
    parameters = [p for model in trainer.models for p in model.parameters()]
    grads = [p.grad for p in parameters if p.grad is not None]
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    states = [leaf for o in optimizers for leaf in tree_leaves(o.state_dict())]
    copies = getattr(optimizer, "copies", {}).values()
    staging = [t for by_type in getattr(optimizer, "_staging", ()) for t in by_type.values()]
    found = (*parameters, *grads, *states, *copies, *staging)
    return [t for t in found if isinstance(t, torch.Tensor)]


def _watch_host(host: Any, live: LiveBytes) -> None:
    """Host memory is the host's from its first byte on: what makes it is not seen to."""
    real = host.empty

    def empty(*args: Any) -> torch.Tensor:
        with _disable_current_modes():
            out: torch.Tensor = real(*args)
        live._see(out)
        return out

    host.empty = empty


def _rank(
    rank: int, folder: str, sizes: dict[str, int], seed: int, offload: tuple[str, ...] = ()
) -> Measured:
    sys.path.insert(0, folder)
    for name in [
        m for m in sys.modules if m.split(".")[0] in ("runtime", "kernels", "model", "train")
    ]:
        del sys.modules[name]
    train = importlib.import_module("train")
    mesh = importlib.import_module("runtime.mesh").Mesh.create("cpu", **sizes)
    batches = importlib.import_module("runtime.batches")
    optimizers = importlib.import_module("runtime.optimizers")
    trainer = train.Trainer(mesh)
    optimizer = optimizers.adamw(
        trainer.models, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1
    )
    host = importlib.import_module("runtime.host") if offload else None
    if "optimizer" in offload:
        optimizer = importlib.import_module("runtime.host_optimizer").on_host(optimizer, mesh)
    data = batches.synthetic(sequence_length=train.SEQUENCE, vocab=train.VOCABULARY, seed=seed)

    def step(number: int) -> None:
        trainer.step(data.batch(number, train.BATCH, mesh))
        trainer.clip(1.0)
        optimizer.step()

    step(0)
    if host is not None and "parameters" in offload:  # where FSDP2 has left them
        for leaf in tree_leaves(optimizer.state_dict()):
            if isinstance(leaf, torch.Tensor):
                host.stands_on_host(leaf)
    trace = _Trace(live=LiveBytes(_tensors(trainer, optimizer), host))
    if host is not None:
        _watch_host(host, trace.live)
    resting = trace.live.now()
    with _first_backward(trace), trace.live:
        step(1)
    return Measured(
        resting=resting,
        forward=trace.forward,
        peak=trace.live.peak,
        host=trace.live.host_peak,
    )


def measure(session: Session, plan: Plan) -> list[Measured]:
    """Of each rank, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        compile_plan(session, plan, Path(folder))
        sizes = mesh_sizes(plan)
        seed = session.program.train.seed
        return run(plan.mesh.world_size, _rank, folder, sizes, seed, plan.offload)
