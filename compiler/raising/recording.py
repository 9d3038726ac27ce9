"""What a module's `__init__` does to its tensors, recorded without giving them memory.

The module is built on fake tensors; every operation goes onto a tape. From the tape come the
initial distribution of each parameter (`Init`) and, for tensors that are functions of constants
alone, their values, computed again in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from llmspec.compiler.errors import Unsupported
from llmspec.compiler.graph import Init


@dataclass(frozen=True, slots=True)
class Entry:
    """One operation: the tensors it took and gave are kept, so that they stay distinct."""

    function: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    outputs: tuple[Tensor, ...]

    @property
    def name(self) -> str:
        return self.function.__name__.partition(".")[0]

    def tensors(self) -> Iterator[Tensor]:
        for leaf in torch.utils._pytree.tree_leaves((self.args, self.options)):
            if isinstance(leaf, Tensor):
                yield leaf


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._number(args[0])
        result = func(*args, **options)
        leaves = torch.utils._pytree.tree_leaves(result)
        outputs = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        self.entries.append(Entry(func, args, options, outputs))
        return result

    def _number(self, tensor: Tensor) -> Any:
        """What `.item()` gives, where that is the same in every run."""
        with unset_fake_temporarily():
            value = Recording(self.entries).value("…", tensor)
            return value.to(tensor.dtype).item()


# --------------------------------------------------------------------------------------------------
# Distributions


@dataclass(frozen=True, slots=True)
class Written:
    """What a storage holds: a distribution, or (init None) something that cannot be drawn again."""

    init: Init | None
    why: str = ""


UNSET = Written(None, "it is never initialised")
DATA = Written(None, "its first values are computed from data")
TRUNCATED = Written(None, "its first values come from a truncated distribution")

FRESH: dict[str, Init] = {
    "zeros": Init("constant", 0.0),
    "zeros_like": Init("constant", 0.0),
    "new_zeros": Init("constant", 0.0),
    "ones": Init("constant", 1.0),
    "ones_like": Init("constant", 1.0),
    "new_ones": Init("constant", 1.0),
    "randn": Init("normal", 0.0, 1.0),
    "randn_like": Init("normal", 0.0, 1.0),
    "rand": Init("uniform", 0.0, 1.0),
    "rand_like": Init("uniform", 0.0, 1.0),
}
COPIES = ("clone", "_to_copy", "contiguous", "lift_fresh_copy", "copy")
CERTAIN = 1 - 1e-6
"""A uniform draw this close to the whole of (-1, 1) gives, through erfinv, a whole normal."""
FAR = 5.0
"""Bounds this many standard deviations away cut nothing off that a draw would show."""


def _affine(written: Written, scale: float, shift: float) -> Written:
    init = written.init
    if init is None:
        return written
    match init.kind:
        case "normal":
            return Written(replace(init, a=init.a * scale + shift, b=init.b * abs(scale)))
        case "uniform":
            ends = sorted((init.a * scale + shift, init.b * scale + shift))
            return Written(replace(init, a=ends[0], b=ends[1]))
        case _:
            return Written(replace(init, a=init.a * scale + shift))


def _arithmetic(name: str, written: Written, entry: Entry) -> Written | None:
    """The effect of `x op number` on a distribution; None when the entry is not of this kind."""
    numbers = [a for a in entry.args[1:2] if isinstance(a, int | float)]
    if name == "neg":
        return _affine(written, -1.0, 0.0)
    if not numbers or not isinstance(entry.args[0], Tensor):
        return None
    number, alpha = float(numbers[0]), float(entry.options.get("alpha", 1))
    if written.init is not None and written.init.zero_rows:
        return DATA
    match name:
        case "mul":
            return _affine(written, number, 0.0)
        case "div":
            return _affine(written, 1 / number, 0.0)
        case "add":
            return _affine(written, 1.0, alpha * number)
        case "sub":
            return _affine(written, 1.0, -alpha * number)
    return None


def _clamped(written: Written, low: float, high: float) -> Written:
    init = written.init
    if init is None or init.kind != "normal":
        return DATA
    near = min(abs(init.a - low), abs(high - init.a)) < FAR * init.b
    return TRUNCATED if near else written


def _two(given: tuple[Any, ...]) -> tuple[float, float]:
    """The arguments of a draw; both distributions default to 0 and 1."""
    numbers = [*map(float, given), *(0.0, 1.0)[len(given) :]]
    return numbers[0], numbers[1]


def _drawn(entry: Entry, written: Written) -> Written:
    """What an in-place operation leaves in a storage that it writes whole."""
    name, args = entry.name.removesuffix("_"), entry.args[1:]
    match name:
        case "normal":
            return Written(Init("normal", *_two(args)))
        case "uniform":
            return Written(Init("uniform", *_two(args)))
        case "zero":
            return Written(Init("constant", 0.0))
        case "fill" if isinstance(args[0], int | float):
            return Written(Init("constant", float(args[0])))
        case "erfinv" if written.init is not None and written.init.kind == "uniform":
            whole = written.init.a <= -CERTAIN and written.init.b >= CERTAIN
            return Written(Init("normal", 0.0, math.sqrt(0.5))) if whole else TRUNCATED
        case "clamp":
            low = args[0] if args and args[0] is not None else entry.options.get("min", -math.inf)
            high = args[1] if len(args) > 1 else entry.options.get("max", math.inf)
            return _clamped(written, float(low), float(high))
    return _arithmetic(name, written, entry) or DATA


def _zeroed_rows(entry: Entry, written: Written, base: tuple[int, ...]) -> Written:
    """A write to a part of a storage: rows of the first dimension set to zero, or unknown data."""
    part = entry.args[0]
    name = entry.name.removesuffix("_")
    zero = name == "zero" or (name == "fill" and entry.args[1] == 0)
    row = math.prod(base[1:])
    init = written.init
    if not zero or init is None or not part.is_contiguous() or row == 0:
        return DATA
    if part.storage_offset() % row or part.numel() % row:
        return DATA
    first = part.storage_offset() // row
    rows = {*init.zero_rows, *range(first, first + part.numel() // row)}
    return Written(replace(init, zero_rows=tuple(sorted(rows))))


def _covers(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _made(entry: Entry, state: dict[int, Written]) -> Written:
    """What an operation that makes a new storage puts there."""
    name = entry.name
    source = next(entry.tensors(), None)
    before = state.get(storage(source), DATA) if source is not None else DATA
    if name.startswith(("empty", "new_empty")):
        return UNSET
    if name in FRESH:
        return Written(FRESH[name])
    if name in ("full", "full_like", "new_full"):
        return Written(Init("constant", float(entry.args[2 if name == "new_full" else 1])))
    if source is None or not _covers(source):
        return DATA
    if name in COPIES:
        return before
    return _arithmetic(name, before, entry) or DATA


def distributions(entries: list[Entry]) -> dict[int, Written]:
    """By storage: what each holds when the tape ends."""
    state: dict[int, Written] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for entry in entries:
        target = entry.args[0] if entry.args and isinstance(entry.args[0], Tensor) else None
        in_place = entry.name.endswith("_") and not entry.name.startswith("_")
        if in_place and target is not None:
            key = storage(target)
            before = state.get(key, DATA)
            if entry.name == "copy_":
                source = entry.args[1]
                whole = _covers(target) and isinstance(source, Tensor) and _covers(source)
                state[key] = state.get(storage(source), DATA) if whole else DATA
            elif entry.name not in ("detach_", "requires_grad_", "set_"):
                shape = shapes.get(key, tuple(target.shape))
                partial = not _covers(target)
                state[key] = (
                    _zeroed_rows(entry, before, shape) if partial else _drawn(entry, before)
                )
            continue
        for output in entry.outputs:
            if storage(output) not in state:
                state[storage(output)] = _made(entry, state)
                shapes[storage(output)] = tuple(output.shape)
    return state


# --------------------------------------------------------------------------------------------------
# Values of buffers

RANDOM = ("normal", "uniform", "rand", "randn", "randint", "randperm", "bernoulli", "multinomial")


def widened(value: Any) -> Any:
    """Arguments of an operation for a run on CPUs in float64."""
    match value:
        case torch.dtype() if value.is_floating_point:
            return torch.float64
        case torch.dtype() if value.is_complex:
            return torch.complex128
        case torch.device():
            return torch.device("cpu")
        case _:
            return value


class wide_defaults:
    """Numbers become float64 tensors inside."""

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_: Any) -> None:
        torch.set_default_dtype(self.before)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


@dataclass(eq=False)
class Recording:
    """The tape of one module, and what was read off it."""

    entries: list[Entry]
    written: dict[int, Written] = field(default_factory=dict)
    traces: dict[tuple[int, int], Any] = field(default_factory=dict)
    """By (sequences, tokens): what was traced already; a search asks for many micro-batches."""

    def init(self, name: str, tensor: Tensor) -> Init:
        """Errors: Unsupported, naming the parameter."""
        written = self.written.get(storage(tensor), UNSET)
        if written.init is None:
            raise Unsupported(f"parameter `{name}` cannot start again elsewhere: {written.why}")
        return written.init

    def _slice(self, wanted: Tensor) -> list[Entry]:
        """The operations that the value of `wanted` depends on, in order."""
        needed, kept = {storage(wanted)}, []
        for entry in reversed(self.entries):
            in_place = entry.name.endswith("_") and not entry.name.startswith("_")
            touched = {storage(o) for o in entry.outputs}
            if in_place and isinstance(entry.args[0], Tensor):
                touched.add(storage(entry.args[0]))
            if touched & needed:
                kept.append(entry)
                needed |= {storage(t) for t in entry.tensors()}
        return kept[::-1]

    def signature(self, wanted: Tensor) -> str:
        """Equal for tensors that are computed alike."""
        numbers: dict[int, int] = {}

        def number(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if not isinstance(value, FakeTensor):
                return ("data", value.tolist())
            shape = (tuple(value.shape), tuple(value.stride()), value.storage_offset())
            return (numbers.setdefault(storage(value), len(numbers)), shape)

        lines = [
            (str(e.function), tree_map(number, e.args), tree_map(number, e.options), len(e.outputs))
            for e in self._slice(wanted)
        ]
        return repr((lines, number(wanted)))

    def value(self, name: str, wanted: Tensor) -> Tensor:
        """The value of a buffer, in float64 where it is floating.

        Errors: Unsupported, naming it, when it depends on random numbers or on no value at all.
        """
        entries = self._slice(wanted)
        if not isinstance(wanted, FakeTensor):
            return _wide(wanted)
        known: dict[int, Tensor] = {}
        bases: dict[int, Tensor] = {}

        def real(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return widened(value)
            if not isinstance(value, FakeTensor):
                return _wide(value)
            if id(value) in known:
                return known[id(value)]
            if storage(value) not in bases:
                raise Unsupported(f"buffer `{name}` has no value that could be computed again")
            base = bases[storage(value)]
            return base.as_strided(value.shape, value.stride(), value.storage_offset())

        with wide_defaults(), torch.no_grad():
            for entry in entries:
                if entry.name.removesuffix("_") in RANDOM:
                    raise Unsupported(f"buffer `{name}` holds random numbers")
                result = entry.function(
                    *tree_map(real, entry.args), **tree_map(real, entry.options)
                )
                leaves = torch.utils._pytree.tree_leaves(result)
                for output, made in zip(
                    entry.outputs, (x for x in leaves if isinstance(x, Tensor)), strict=True
                ):
                    known[id(output)] = made
                    bases.setdefault(storage(output), made)
            return real(wanted).detach()


ATTRIBUTE = "_recorded"


class NotAModule(Exception):
    """What was to build a module gave something else."""


def _truncated(
    tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Any = None
) -> Tensor:
    """PyTorch's own draws again until all values are within bounds: that needs the values."""
    with torch.no_grad():
        return tensor.normal_(mean, std).clamp_(a, b)


def record(build: Callable[[], nn.Module]) -> nn.Module:
    """Runs `build` without memory; the module that it returns knows how it was made."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tape = Tape()
    with mode, tape, mock.patch.object(nn.init, "_no_grad_trunc_normal_", _truncated):
        module = build()
    if not isinstance(module, nn.Module):
        raise NotAModule
    recording = Recording(tape.entries, distributions(tape.entries))
    object.__setattr__(module, ATTRIBUTE, recording)
    return module


def recording_of(module: nn.Module) -> Recording:
    found = module.__dict__.get(ATTRIBUTE)
    if found is None:
        raise Unsupported("a module whose initialisation was not recorded")
    return found


def fake_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that hangs on the module: parameters, buffers and plain attributes, by name."""
    seen: set[int] = set()
    for prefix, part in module.named_modules():
        held = itertools.chain(
            part._parameters.items(), part._buffers.items(), part.__dict__.items()
        )
        for name, value in held:
            if name == ATTRIBUTE or (name.startswith("_") and isinstance(value, dict)):
                continue
            for leaf in torch.utils._pytree.tree_leaves(value):
                if isinstance(leaf, Tensor) and id(leaf) not in seen:
                    seen.add(id(leaf))
                    yield (f"{prefix}.{name}" if prefix else name), leaf
