"""AdamW and SGD whose weights or moments are shorter than float32, or of different types.

PyTorch's fused kernels want weights, gradients and moments of one type. Here each part of a
parameter is widened to float32, updated by the very same kernels, and rounded back.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from . import random
from .gradients import local_gradient
from .initialise import block_offsets, chunks
from .optimizers import Models, groups, named_parameters


def adamw(
    model: Models,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    moments: torch.dtype,
    rounding: str = "nearest",
    seed: int = 0,
) -> "AdamW":
    """moments: their type. rounding: of updated weights, "nearest" or "stochastic".

    Stochastic rounding is a function of (seed, name, update, position in the whole weight),
    whatever ranks hold it.
    """
    options = {"lr": lr, "betas": betas, "eps": eps, "fused": True}
    return AdamW(model, groups(model, weight_decay), options, moments, rounding, seed)


def sgd(
    model: Models,
    *,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    moments: torch.dtype,
    rounding: str = "nearest",
    seed: int = 0,
) -> "SGD":
    """moments, rounding, seed: as for `adamw`."""
    options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "fused": True}
    return SGD(model, groups(model, weight_decay), options, moments, rounding, seed)


class _Short(Optimizer):
    """moments: the type of what is kept. Names of the state are those of PyTorch's classes, so that
    checkpoints of both go together."""

    kept: tuple[str, ...] = ()  # names of the moments

    def __init__(
        self,
        model: Models,
        parameters: list[dict[str, Any]],
        options: dict[str, Any],
        moments: torch.dtype,
        rounding: str,
        seed: int,
    ):
        assert rounding in ("nearest", "stochastic"), rounding
        super().__init__(parameters, options)
        self.moments, self.stochastic, self.seed = moments, rounding == "stochastic", seed
        self.names = {p: name for name, p in named_parameters(model)}
        self.whole: dict[Any, Any] = {}  # of copies in host memory, what they are copies of

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "gradients are there already"
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)

    def _update(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            for name in self._kept(group):
                state[name] = torch.zeros_like(p, dtype=self.moments, requires_grad=False)
        state["step"] += 1
        kept = [_local(state[name]).view(-1) for name in self._kept(group)]
        gradient = local_gradient(p).reshape(-1)
        for part, start, index in self._parts(p):
            here = slice(start, start + part.numel())
            wide = part.float()  # itself if it is float32
            moments = [m[here].float() for m in kept]
            self._kernel(wide, gradient[here].float(), moments, state["step"], group)
            for stored, moment in zip(kept, moments, strict=True):
                if stored.dtype != torch.float32:
                    stored[here] = moment
            if part.dtype != torch.float32:
                part.copy_(self._rounded(wide, p, state["step"], index))

    def _kept(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.kept

    def _parts(self, p: nn.Parameter) -> Iterator[tuple[Tensor, int, Tensor]]:
        """(flat part of the local weight, where it begins, positions in the whole one)."""
        whole = self.whole.get(p, p)
        offsets = block_offsets(whole) if isinstance(whole, DTensor) else (0,) * p.ndim
        start = 0
        for part, index in chunks(_local(p), tuple(whole.shape), offsets):
            yield part, start, index
            start += part.numel()

    def _rounded(self, wide: Tensor, p: nn.Parameter, step: Tensor, index: Tensor) -> Tensor:
        if not self.stochastic:
            return wide  # copying it rounds to the nearest
        key = random.key(self.seed, f"rounding {self.names[self.whole.get(p, p)]}")
        update = random.bits(key, step.long())
        return random.round_to_bfloat16(wide, random.bits(update, index))

    def _kernel(
        self, wide: Tensor, gradient: Tensor, moments: list[Tensor], step: Tensor, group: Any
    ) -> None:
        raise NotImplementedError


class AdamW(_Short):
    kept = ("exp_avg", "exp_avg_sq")

    def _kernel(
        self, wide: Tensor, gradient: Tensor, moments: list[Tensor], step: Tensor, group: Any
    ) -> None:
        torch._fused_adamw_(
            [wide],
            [gradient],
            moments[:1],
            moments[1:],
            [],
            [step],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


class SGD(_Short):
    kept = ("momentum_buffer",)

    def _kept(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.kept if group["momentum"] else ()

    def _kernel(
        self, wide: Tensor, gradient: Tensor, moments: list[Tensor], step: Tensor, group: Any
    ) -> None:
        torch._fused_sgd_(
            [wide],
            [gradient],
            moments,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
            is_first_step=False,
        )


def _local(x: Tensor) -> Tensor:
    return x._local_tensor if isinstance(x, DTensor) else x
