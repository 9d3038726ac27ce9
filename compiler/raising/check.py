"""The raise itself, checked: loss and gradients against the user's own module, in float64."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from llmspec.compiler.graph import Init, ModelGraph, Parameter
from llmspec.compiler.raising.recording import (
    ATTRIBUTE,
    fake_tensors,
    recording_of,
    wide_defaults,
    widened,
)
from llmspec.compiler.raising.trace import Logits
from llmspec.compiler.reference import Reference

ROWS = re.compile(r"(.*)_rows_(\d+)_(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """How far graph and module are apart: the loss relative to itself, gradients to their norm."""

    loss: float
    gradients: dict[str, float]

    def worst(self) -> float:
        return max([self.loss, *self.gradients.values()])


# --------------------------------------------------------------------------------------------------
# Names


def from_module(name: str, parameter: Parameter, tensors: Mapping[str, Tensor]) -> Tensor:
    """The value that a graph's parameter has among a module's (or of their gradients)."""
    if name in tensors:
        return tensors[name].reshape(parameter.shape)
    part = ROWS.fullmatch(name)
    if part is None:
        raise KeyError(name)
    return tensors[part[1]][int(part[2]) : int(part[3])]


# --------------------------------------------------------------------------------------------------
# A real module


class Wide(TorchDispatchMode):
    """Whatever asks for a narrower floating type gets float64."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(widened, args), **tree_map(widened, kwargs or {}))


class _SameEpsilon(TorchFunctionMode):
    """A norm without epsilon takes float32's, as it does in training, not float64's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func in (F.rms_norm, torch.rms_norm) and len(args) < 4 and options.get("eps") is None:
            options["eps"] = torch.finfo(torch.float32).eps
        return func(*args, **options)


def _start(init: Init, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Values that hide nothing: constants are shaken, so that every gradient matters."""
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    match init.kind:
        case "constant":
            return init.a + 0.1 * noise
        case "uniform":
            return (init.a + init.b) / 2 + (init.b - init.a) / 4 * noise
        case _:
            return init.a + max(init.b, 0.05) * noise


def materialised(module: nn.Module, seed: int = 0) -> nn.Module:
    """A copy of a recorded module with memory, in float64, its buffers computed again."""
    recording = recording_of(module)
    generator = torch.Generator().manual_seed(seed)
    memo: dict[int, Any] = {id(recording): recording}
    for name, tensor in fake_tensors(module):
        if isinstance(tensor, nn.Parameter):
            init = recording.init(name, tensor)
            memo[id(tensor)] = nn.Parameter(_start(init, tensor.shape, generator))
        elif isinstance(tensor, FakeTensor):
            memo[id(tensor)] = recording.value(name, tensor)
        elif tensor.is_floating_point():
            memo[id(tensor)] = tensor.double()
    real = copy.deepcopy(module, memo)
    real.__dict__.pop(ATTRIBUTE, None)
    return real


def check_raised(module: nn.Module, graph: ModelGraph, seed: int = 0) -> Raised:
    """Runs both on the same random weights, tokens and targets, without dropout."""
    real = materialised(module, seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    size = (graph.sequences, graph.tokens)
    tokens, targets = (torch.randint(graph.vocab, size, generator=generator) for _ in range(2))
    named = dict(real.named_parameters())
    with wide_defaults(), Wide(), _SameEpsilon():
        logits = Logits(real)(tokens)
        theirs = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        theirs.backward()
    wanted = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in named.items()}
    own: dict[str, Tensor] = {
        name: nn.Parameter(from_module(name, parameter, named).detach().clone())
        for name, parameter in graph.parameters()
    }
    ours = Reference(graph, own).loss(tokens, targets, torch.arange(graph.sequences))
    ours.backward()
    return _compared(graph, theirs, ours, wanted, own)


def _compared(
    graph: ModelGraph,
    theirs: Tensor,
    ours: Tensor,
    wanted: dict[str, Tensor],
    own: dict[str, Tensor],
) -> Raised:
    total = torch.stack([g.norm() for g in wanted.values()]).norm().item()
    gradients: dict[str, float] = {}
    for name, parameter in graph.parameters():
        want = from_module(name, parameter, wanted)
        have = own[name].grad
        have = have if have is not None else torch.zeros_like(want)
        floor = max(want.norm().item(), 1e-6 * total)
        gradients[name] = (have - want).norm().item() / floor
    loss = abs(ours.item() - theirs.item()) / abs(theirs.item())
    return Raised(loss=loss, gradients=gradients)
