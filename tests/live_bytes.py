"""Bytes of live tensors while an emitted program really runs, on forked gloo ranks.

`measure(session, plan)` emits the plan at its own size (write small specs), runs an optimizer
step of it on synthetic data, and watches three more with the dry run's LiveBytes. What a kernel
allocates and frees by itself, and the buffers of gloo, are not seen. Its threads let go of what
they sent a moment late, now and then: the least peak of the steps is the program's.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from llmspec.compiler.driver import Session, compile_plan
from llmspec.compiler.dryrun.live import LiveBytes, resizes_seen
from llmspec.compiler.plan import Plan
from llmspec.compiler.precision import TORCH, Precision, precision_of
from llmspec.compiler.verify.run import mesh_sizes
from tests.processes import run

WATCHED = (1, 2, 3)
"""Steps."""


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
    peak_at: str = ""


@dataclass(slots=True)
class _Trace:
    forward: int = 0
    live: LiveBytes = field(default_factory=LiveBytes)


@contextmanager
def _first_backward(trace: _Trace) -> Iterator[None]:
    """Notes what is alive as the first backward begins."""
    real = torch.autograd.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        trace.forward = trace.forward or trace.live.now
        real(*args, **kwargs)

    torch.autograd.backward = backward  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.backward = real  # type: ignore[assignment]


@contextmanager
def _let_go() -> Iterator[None]:
    """After an exchange gloo's threads get the time to let go of what they sent."""
    real = dist.all_to_all_single

    def exchange(*args: Any, **kwargs: Any) -> Any:
        out = real(*args, **kwargs)
        time.sleep(0.005)
        return out

    dist.all_to_all_single = exchange
    try:
        yield
    finally:
        dist.all_to_all_single = real


@contextmanager
def _sums_unseen(live: LiveBytes) -> Iterator[None]:
    """Gloo sums in a copy of what it is given, and shows it as it takes the own part of that."""
    names = ("reduce_scatter_single", "reduce_scatter_tensor")
    places = [(dist, name) for name in names if hasattr(dist, name)]
    places.append((importlib.import_module("runtime.collectives"), "_reduce_scatter"))
    known = [getattr(*place) for place in places]
    for place, real in zip(places, known, strict=True):
        setattr(*place, live.unseen(real))
    try:
        yield
    finally:
        for place, real in zip(places, known, strict=True):
            setattr(*place, real)


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
    empty, stands_on_host = host.empty, host.stands_on_host

    def unseen(*args: Any) -> torch.Tensor:
        with _disable_current_modes():
            return empty(*args)

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        live.see(stands_on_host(tensor))
        return tensor

    host.empty, host.stands_on_host = unseen, counted


def _optimizer(models: Any, precision: Precision, seed: int) -> Any:
    """As train.py makes it."""
    how: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    if not precision.own_update:
        return importlib.import_module("runtime.optimizers").adamw(models, **how)
    how["moments"] = getattr(torch, TORCH[precision.moments].removeprefix("torch."))
    if precision.stochastic:
        how |= {"rounding": "stochastic", "seed": seed}
    return importlib.import_module("runtime.short_optimizers").adamw(models, **how)


def _rank(
    rank: int,
    folder: str,
    sizes: dict[str, int],
    seed: int,
    offload: tuple[str, ...],
    precision: Precision,
) -> Measured:
    sys.path.insert(0, folder)
    for name in [
        m for m in sys.modules if m.split(".")[0] in ("runtime", "kernels", "model", "train")
    ]:
        del sys.modules[name]
    train = importlib.import_module("train")
    mesh = importlib.import_module("runtime.mesh").Mesh.create("cpu", **sizes)
    batches = importlib.import_module("runtime.batches")
    trainer = train.Trainer(mesh)
    optimizer = _optimizer(trainer.models, precision, seed)
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
    is_host = host.is_host if host is not None else lambda storage: False
    trace = _Trace(live=LiveBytes(_tensors(trainer, optimizer), is_host))
    if host is not None:
        _watch_host(host, trace.live)
    resting = trace.live.now
    found: list[Measured] = []
    live = trace.live
    with _first_backward(trace), resizes_seen(live), _sums_unseen(live), _let_go(), live:
        for number in WATCHED:
            trace.forward = 0
            trace.live.begin()
            step(number)
            found.append(
                Measured(
                    resting=resting,
                    forward=trace.forward,
                    peak=trace.live.peak,
                    host=trace.live.host_peak,
                    peak_at=trace.live.peak_at,
                )
            )
    return min(found, key=lambda one: one.peak)


def measure(session: Session, plan: Plan) -> list[Measured]:
    """Of each rank, in rank order."""
    with tempfile.TemporaryDirectory() as folder:
        compile_plan(session, plan, Path(folder))
        sizes = mesh_sizes(plan)
        train = session.program.train
        more = train.seed, plan.offload, precision_of(train)
        return run(plan.mesh.world_size, _rank, folder, sizes, *more)
