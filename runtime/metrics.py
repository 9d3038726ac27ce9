"""Loss and speed of each step: a line for the eye, JSON lines for programs, TensorBoard if it is
installed; and the ranks' agreement to stop."""

import importlib.util
import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .batches import Ramp
from .errors import UserError
from .mesh import Mesh
from .predicted import Comparison, Predicted, comparison_lines, peak_memory_bytes

WINDOW = 20  # steps over which speed is averaged


class Metrics:
    """path: of the JSON lines; a resumed run keeps those up to `first` and goes on behind them.

    steps: of the whole run. first: how many were done before. tokens_per_step: with a `ramp`, of
    the steps that come after it. every, every_s: steps and seconds between progress lines.
    flops_per_token, peak_flops: of the model, and of one device per second, for MFU.
    predicted: what the end of the run is compared with.
    """

    def __init__(
        self,
        path: str,
        mesh: Mesh,
        *,
        steps: int,
        tokens_per_step: int,
        ramp: Ramp | None = None,
        first: int = 0,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        predicted: Predicted | None = None,
        every: int = 1,
        every_s: float = 0.0,
    ):
        self.mesh, self.steps, self.first = mesh, steps, first
        self.every, self.every_s = every, every_s
        self.tokens_per_step, self.ramp = tokens_per_step, ramp
        self.utilisation = None
        if flops_per_token and peak_flops:
            self.utilisation = flops_per_token / (peak_flops * mesh.world.size)
        self.comparison = Comparison(predicted) if predicted is not None else None
        self.speaks = mesh.world.rank == 0
        self.recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # (seconds, tokens)
        self.pending: _Pending | None = None
        self.stop = False
        self.done = first
        self.said_s = -math.inf
        self.log = _Log(Path(path), first) if self.speaks else None
        self.mark_s = time.perf_counter()

    def step(
        self,
        step: int,
        loss: Tensor | None,
        norm: Tensor,
        lr: float,
        *,
        stop: bool = False,
        parts: Mapping[str, Tensor] | None = None,
        figures: Mapping[str, Tensor] | None = None,
    ) -> bool:
        """Record the step that was just done (counted from 1); whether all ranks stop now.

        loss: this rank's part of the global mean; None or 0 where the last stage is not.
        stop: whether this rank was asked to; then all stop at the same step.
        parts: further numbers that are sums over all ranks, of which each has its part, by what the
            log calls them. figures: the same that all ranks know already.

        On GPUs a step's values are read during the next one, so that the host never waits for the
        step it has just launched; they stop one step later.
        """
        now_s = time.perf_counter()
        parts, figures = parts or {}, figures or {}
        stopping = _number(float(stop), self.mesh)
        own = torch.stack([_own_part(loss, self.mesh), stopping, *parts.values()])
        if self.mesh.world.size > 1:
            dist.all_reduce(own, group=self.mesh.world.group)
        rest = [value.detach().to(own).reshape(1) for value in (*figures.values(), norm)]
        values = torch.cat([own, *rest])
        current = _Pending.of(step, values, lr, now_s - self.mark_s, (*parts, *figures))
        self.mark_s = now_s
        if values.is_cuda:
            previous, self.pending = self.pending, current
            self._record(previous)
            if step >= self.steps:
                self.flush()
        else:
            self._record(current)
        return self.stop

    def validation(self, step: int, loss: float) -> None:
        """loss: the mean over all ranks (`reduce_loss`)."""
        self.flush()
        if self.log is not None:
            self.log.write({"step": step, "validation_loss": loss})
            print(
                f"step {step:>{self._width()}}/{self.steps}  validation loss {loss:.4f}", flush=True
            )
        self.mark_s = time.perf_counter()  # the next step's time begins here

    def flush(self) -> None:
        """Record what is still in flight: before a checkpoint, whose step the log must reach."""
        if self.comparison is not None:
            self.comparison.interrupted(self.mesh.device)
        previous, self.pending = self.pending, None
        self._record(previous)

    def say(self, text: str) -> None:
        """One line from one rank."""
        if self.speaks:
            print(text, flush=True)

    def close(self) -> None:
        """Called on every rank. What was measured is said beside what was predicted."""
        self.flush()
        figures = self.comparison.measured(self.mesh) if self.comparison is not None else {}
        if self.log is None:
            return
        if figures:
            self.log.write({"step": self.done, **figures})
            print("\n".join(comparison_lines(figures)), flush=True)
        self.log.close()

    def _record(self, pending: "_Pending | None") -> None:
        if pending is None:
            return
        loss, stop, *rest, norm = pending.read()
        figures = dict(zip(pending.names, rest, strict=True))
        if not math.isfinite(loss):
            # every rank has read the same number, so all stop here
            raise UserError(
                f"the loss of step {pending.step} is {loss}: nothing is saved after it; "
                "start again from the last checkpoint with a lower learning rate or other data"
            )
        self.stop = self.stop or stop > 0
        self.done = pending.step
        if pending.step > self.first + 1 or self.first + 1 == self.steps:
            # the first step warms up
            self.recent.append((pending.seconds, self._tokens_of(pending.step)))
            whole = self._tokens_of(pending.step) == self.tokens_per_step
            if whole and self.comparison is not None:
                self.comparison.step(pending.seconds)
        if self.log is None:
            return
        self.log.write(
            {
                "step": pending.step,
                "loss": loss,
                # JSON has no infinity: the norm of a step whose gradients overflowed is null
                "gradient_norm": norm if math.isfinite(norm) else None,
                "learning_rate": pending.lr,
                "tokens": self._tokens(pending.step),
                "seconds": pending.seconds,
                **figures,
            }
        )
        now_s = time.perf_counter()
        last = pending.step >= self.steps or self.stop
        due = pending.step % self.every == 0 and now_s - self.said_s >= self.every_s
        if last or due:
            self.said_s = now_s
            print(self._line(pending, loss, norm, figures), flush=True)

    def _line(
        self, pending: "_Pending", loss: float, norm: float, figures: Mapping[str, float]
    ) -> str:
        recent = self.recent or [(pending.seconds, self._tokens_of(pending.step))]
        tokens_per_s = sum(tokens for _, tokens in recent) / sum(seconds for seconds, _ in recent)
        parts = [
            f"step {pending.step:>{self._width()}}/{self.steps}",
            f"loss {loss:.4f}",
            f"norm {norm:.3g}",
            f"lr {pending.lr:.2e}",
            *(f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items()),
            f"{_short(tokens_per_s)} tokens/s",
        ]
        if self.utilisation is not None:
            parts.append(f"mfu {100 * tokens_per_s * self.utilisation:.1f} %")
        parts.append(f"memory {peak_memory_bytes(self.mesh.device) / 2**30:.2f} GiB")
        if self.recent and pending.step < self.steps:
            left = self._tokens(self.steps) - self._tokens(pending.step)
            parts.append(f"{_duration(left / tokens_per_s)} left")
        return "  ".join(parts)

    def _tokens(self, steps: int) -> int:
        """That the first so many steps see."""
        if self.ramp is None:
            return steps * self.tokens_per_step
        return self.ramp.first(steps) * (self.tokens_per_step // self.ramp.batch)

    def _tokens_of(self, step: int) -> int:
        """step: counted from 1."""
        return self._tokens(step) - self._tokens(step - 1)

    def _width(self) -> int:
        return len(str(self.steps))


def reduce_loss(loss: Tensor | None, mesh: Mesh) -> float:
    """The sum of all data ranks' parts, known to every rank."""
    total = _own_part(loss, mesh)
    if mesh.world.size > 1:
        dist.all_reduce(total, group=mesh.world.group)
    return float(total)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pending:
    """values: [loss, ranks that stop, further ones by `names`, norm], on the host or on its way."""

    step: int
    values: Tensor
    lr: float
    seconds: float
    names: tuple[str, ...]
    arrived: Any

    @staticmethod
    def of(
        step: int, values: Tensor, lr: float, seconds: float, names: tuple[str, ...] = ()
    ) -> "_Pending":
        arrived = None
        if values.is_cuda:
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(
                values, non_blocking=True
            )
            arrived = torch.cuda.Event()
            arrived.record()
        return _Pending(
            step=step, values=values, lr=lr, seconds=seconds, names=names, arrived=arrived
        )

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values.tolist()


class _Log:
    def __init__(self, path: Path, first: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(path.name + ".tmp")
        with open(draft, "w") as file:
            file.writelines(_kept_lines(path, first))
        os.replace(draft, path)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 (open as long as the run)
        self.board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow, and only if it is there

            self.board = SummaryWriter(path.parent / "tensorboard", purge_step=first + 1)

    def write(self, values: Mapping[str, float | None]) -> None:
        self.file.write(json.dumps(values) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self.board.add_scalar(name, value, values["step"])

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def _kept_lines(path: Path, first: int) -> list[str]:
    """Of steps up to `first`; a line that a killed run left half written is dropped."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= first:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _own_part(loss: Tensor | None, mesh: Mesh) -> Tensor:
    """Every tensor rank holds the same loss: one of them counts."""
    if loss is None or mesh.tensor.rank != 0:
        return _number(0.0, mesh)
    return loss.detach().to(mesh.device, torch.float64).reshape(())


def _number(value: float, mesh: Mesh) -> Tensor:
    return torch.full((), value, dtype=torch.float64, device=mesh.device)


def _short(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    """At most two units, rounded to the smaller one."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 10:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
