"""Values that are dropped after the forward and computed again in the backward, one by one.

    def forward(self, x):
        return recomputed(self.run, {"normed", "hidden"}, x)

    def run(self, x):
        normed = again("normed", rms_norm, x, local(self.norm))
        hidden = again("hidden", F.gelu, F.linear(normed, local(self.up)))
        return x + F.linear(hidden, local(self.down))

Whoever keeps a dropped value for its backward (the products above) keeps a note in its place, and
so does the operator that makes it for what it keeps besides its operands (an attention's
statistics, a mask). The first note that is opened runs the operator again, once for all of them;
what it reads is kept, or is itself a note. torch.utils.checkpoint drops whole functions, results
apart: a norm whose result three products keep would cost the three products again.
"""

from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

EVERYTHING = "everything"


def recomputed(run: Callable[..., Tensor], dropped: Collection[str], *inputs: Tensor) -> Tensor:
    """run(*inputs), and of what it computes by `again` the values that `dropped` names are dropped.

    EVERYTHING: all but the inputs is dropped, and the whole of `run` runs again.
    """
    if dropped == EVERYTHING:
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    if not dropped or not torch.is_grad_enabled():
        return run(*inputs)
    scope = _Scope(dropped)
    token = _SCOPE.set(scope)
    try:
        with saved_tensors_hooks(scope.pack, _open):
            return run(*inputs)
    finally:
        _SCOPE.reset(token)
        scope.values.clear()  # autograd holds the scope by its hooks; values live by their notes


def again(name: str, function: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """function(*args, **options); dropped where the block that runs drops values of this name.

    function: reads no tensor but its arguments, and computes the same each time.
    """
    scope = _SCOPE.get()
    if scope is None or name not in scope.dropped:
        return function(*args, **options)
    call = _Call(function, [scope.argument(a) for a in args], options)
    with saved_tensors_hooks(call.packer(scope, args), _open):
        out = function(*args, **options)
    scope.drop(out, call, args)
    return out


@dataclass(frozen=True, slots=True)
class _Shape:
    """How a tensor lies in its storage."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(x: Tensor) -> "_Shape":
        return _Shape(x.size(), x.stride(), int(x.storage_offset()))


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Value:
    """One tensor that a call makes: its result, or something that it keeps. Lives as long as
    someone may still ask for it, and so does the tensor once it is there."""

    call: "_Call"
    tensor: Tensor | None = None

    def get(self) -> Tensor:
        if self.tensor is None:
            self.call.run()
        assert self.tensor is not None, "a value was computed again and is not there"
        return self.tensor


@dataclass(frozen=True, slots=True)
class _Note:
    """What autograd keeps in place of a tensor."""

    value: _Value
    shape: _Shape

    def open(self) -> Tensor:
        return self.value.get().as_strided(self.shape.size, self.shape.stride, self.shape.offset)


@dataclass(frozen=True, slots=True)
class _Argument:
    """A tensor that a call reads: it stays, or is a note. What a call keeps depends on whether its
    arguments need gradients."""

    saved: "Tensor | _Note | _Elsewhere"
    needs_gradient: bool

    def open(self) -> Tensor:
        return _open(self.saved).detach().requires_grad_(self.needs_gradient)


def _open(saved: "Tensor | _Note | _Elsewhere") -> Tensor:
    return saved if isinstance(saved, Tensor) else saved.open()


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@dataclass(frozen=True, slots=True)
class _Elsewhere:
    """A tensor that those keep who asked to before this module did: in host memory, say."""

    saved: Any
    fetch: Callable[[Any], Tensor]

    def open(self) -> Tensor:
        return self.fetch(self.saved)


class _Scope:
    """The dropped values of one run of a block, by their storage."""

    def __init__(self, dropped: Collection[str]):
        self.dropped = dropped
        # saved-tensor hooks do not nest: the outer ones must be called by hand
        self.outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self.values: dict[int, tuple[StorageWeakRef, _Value]] = {}

    def drop(self, out: Tensor, call: "_Call", args: tuple[Any, ...]) -> None:
        # a result that is a view of an argument has nothing of its own to drop
        if all(not isinstance(a, Tensor) or _key(a) != _key(out) for a in args):
            value = _Value(call)
            call.result = ref(value)
            self.values[_key(out)] = StorageWeakRef(out.untyped_storage()), value

    def value(self, x: Tensor) -> _Value | None:
        # the weak reference keeps the storage's address from being given to another
        found = self.values.get(_key(x))
        return None if found is None or found[0].expired() else found[1]

    def pack(self, x: Tensor) -> "Tensor | _Note | _Elsewhere":
        value = self.value(x)
        if value is not None:
            return _Note(value, _Shape.of(x))
        return _Elsewhere(self.outer[0](x), self.outer[1]) if self.outer else x

    def argument(self, x: Any) -> Any:
        return _Argument(self.pack(x.detach()), x.requires_grad) if isinstance(x, Tensor) else x


@dataclass(eq=False, slots=True)
class _Call:
    """One call of an operator, and how to make it again.

    extras: what it keeps besides its arguments, in the order in which it keeps them.
    """

    function: Callable[..., Tensor]
    args: list[Any]
    options: dict[str, Any]
    result: Callable[[], _Value | None] = lambda: None
    extras: list[Callable[[], _Value | None]] = field(default_factory=list)

    def packer(self, scope: _Scope, args: tuple[Any, ...]) -> Callable[[Tensor], Any]:
        """Arguments are kept as they are, or by their own notes; the rest by notes of this call."""
        own = {_key(a) for a in args if isinstance(a, Tensor)}

        def pack(x: Tensor) -> Any:
            if _key(x) in own:
                return scope.pack(x)
            value = _Value(self)
            self.extras.append(ref(value))
            return _Note(value, _Shape.of(x))

        return pack

    def run(self) -> None:
        """Make every value that someone may still ask for."""
        args = [a.open() if isinstance(a, _Argument) else a for a in self.args]
        own = {_key(a) for a in args if isinstance(a, Tensor)}
        extras = iter(self.extras)

        def collect(x: Tensor) -> None:
            if _key(x) not in own and (value := next(extras)()) is not None:
                value.tensor = x

        with torch.enable_grad(), saved_tensors_hooks(collect, _never):
            out = self.function(*args, **self.options)
        if (value := self.result()) is not None:
            value.tensor = out.detach()
        self.args.clear()  # runs once: what it read may go


def _never(_: None) -> Tensor:
    raise AssertionError("the graph of a value that is computed again is never run backward")


_SCOPE: ContextVar[_Scope | None] = ContextVar("scope", default=None)
