"""The factor that keeps float16 gradients in range, and the steps that are skipped when it fails.

The gradient norm that clipping reads is one number for all ranks, and it is finite if and only if
every gradient on every rank is. Whoever decides by it decides like all others: data, tensor,
pipeline, context and expert ranks skip the same step and halve together, with no further message.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import UserError

GROWTH, BACKOFF = 2.0, 0.5  # those of torch.amp.GradScaler
MOST_SKIPPED = 30  # in a row: from the largest scale that ever helped to far below 1


class LossScale:
    """value: what losses are multiplied with now. skipped: steps without an update, over the run.

    dynamic: the value halves after a step whose gradients overflow, and doubles after `grow_every`
        good ones; else it stays.
    used: the value of the step that `accepts` was last asked about.
    """

    def __init__(self, value: float = 65536.0, *, dynamic: bool = True, grow_every: int = 2000):
        self.value = self.used = value
        self.dynamic, self.grow_every = dynamic, grow_every
        self.good = self.bad = self.skipped = 0  # good, bad: steps in a row

    def accepts(self, norm: Tensor) -> bool:
        """Whether the optimizer may use this step's gradients. norm: what `clip_` returned.

        Reads the norm, so the host waits for the step's backward once.
        Errors: UserError when no scale helps.
        """
        self.used = self.value
        if math.isfinite(float(norm)):
            self.good, self.bad = self.good + 1, 0
            if self.dynamic and self.good % self.grow_every == 0:
                self.value *= GROWTH
            return True
        self.good, self.bad, self.skipped = 0, self.bad + 1, self.skipped + 1
        if self.dynamic:
            self.value *= BACKOFF
        if self.bad == MOST_SKIPPED:
            raise UserError(
                f"the gradients of {self.bad} steps in a row overflowed float16, the last at a loss"
                f" scale of {self.used:g}: train in bf16, or with a lower learning rate"
            )
        return False

    def report(self) -> dict[str, Tensor]:
        """For the log: the scale of the last step, and all steps skipped so far."""
        numbers = {"loss_scale": self.used, "skipped": self.skipped}
        return {name: torch.tensor(n, dtype=torch.float64) for name, n in numbers.items()}

    def state(self) -> dict[str, Any]:
        """For checkpoints: the same on every rank."""
        return {"loss_scale": [self.value, self.good, self.bad, self.skipped]}

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """What `state` gave; a run that had none begins with the first value."""
        if saved and "loss_scale" in saved:
            value, self.good, self.bad, self.skipped = saved["loss_scale"]
            self.value = value if self.dynamic else self.value
