"""Parameters that know their whole shape: plain tensors, or DTensors over the tensor ranks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from .collectives import chunk_bounds
from .mesh import Mesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What the runtime must know about a parameter besides its values.

    init: a descriptor of initialise.py.
    partial: each tensor rank computes a part of the gradient's sum.
    decay: whether weight decay may apply.
    rate: how far each step moves it, of a buffer that steps move.
    """

    init: Any
    partial: bool = False
    decay: bool = True
    rate: float | None = None


class Group(nn.Module):
    """Only names its parameters and groups: `self.q_proj = Group(weight=..., bias=...)`."""

    def __init__(self, **members: nn.Parameter | nn.Buffer | nn.Module | None):
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)

    if TYPE_CHECKING:  # what a name holds is known where it is used

        def __getattr__(self, name: str) -> Any: ...


def parameter(
    shape: tuple[int, ...],
    *,
    mesh: Mesh,
    init: Any,
    split: dict[str, int] | None = None,
    partial: bool = False,
    decay: bool = True,
    dtype: torch.dtype = torch.float32,
) -> nn.Parameter:
    """On the meta device; `initialise` gives it memory and values.

    split: {"tensor": dim} cuts this dim over the tensor ranks as torch.chunk does; {"expert": dim}
        over the expert ranks, which must divide it.
    partial: see Traits; only for parameters that are whole on every tensor rank.
    """
    assert not (partial and "tensor" in (split or {})), "a split parameter has a whole gradient"
    out = nn.Parameter(_meta(tuple(shape), mesh, split or {}, dtype))
    out.traits = Traits(init=init, partial=partial, decay=decay)  # type: ignore[attr-defined]
    return out


def buffer(
    shape: tuple[int, ...],
    *,
    init: Any,
    rate: float | None = None,
    dtype: torch.dtype = torch.float32,
    kept: bool = True,
) -> nn.Buffer:
    """State that is no weight, alike on all ranks; on the meta device until `initialise`.

    rate: see Traits. kept: part of checkpoints.
    """
    out = nn.Buffer(torch.empty(shape, device="meta", dtype=dtype), persistent=kept)
    out.traits = Traits(init=init, decay=False, rate=rate)  # type: ignore[attr-defined]
    return out


def local(p: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """This rank's part, differentiable; no communication, now or in the backward."""
    if isinstance(p, DTensor):
        p = p.to_local()
    if dtype is None or p.dtype == dtype:
        return p
    p = p.to(dtype)
    if Casts.watched:
        Casts.storages.add(p.untyped_storage())
    return p


class Casts:
    """Weights in another type than they are stored in, to be told from activations where those
    leave the device (host_activations.py)."""

    watched = False
    storages: ClassVar[WeakSet[torch.UntypedStorage]] = WeakSet()


def traits(model: nn.Module) -> dict[str, Traits]:
    """By name, tied names included, of all parameters (and buffers) that carry traits.

    FSDP2 and `to_empty` replace parameter objects and drop their attributes, so the first call
    keeps the traits on the owning modules; wrappers call it before they touch anything.
    """
    found: dict[str, Traits] = {}
    for module_name, module in model.named_modules():
        kept: dict[str, Traits] = module.__dict__.setdefault("_traits", {})
        for name, p in (*module._parameters.items(), *module._buffers.items()):
            if p is not None and hasattr(p, "traits"):
                kept[name] = p.traits
        prefix = f"{module_name}." if module_name else ""
        found |= {prefix + name: t for name, t in kept.items()}
    return found


def is_expert(p: Tensor) -> bool:
    """Whether the expert ranks hold different parts of it."""
    return isinstance(p, DTensor) and "expert" in (p.device_mesh.mesh_dim_names or ())


def _meta(shape: tuple[int, ...], mesh: Mesh, split: dict[str, int], dtype: torch.dtype) -> Tensor:
    assert set(split) <= {"expert", "tensor"}, f"no parameter is split over {set(split)}"
    axes = [a for a in (mesh.expert, mesh.tensor) if a.size > 1]
    if "expert" not in split:
        axes = [a for a in axes if a is mesh.tensor]
    if not axes:
        return torch.empty(shape, device="meta", dtype=dtype)
    local_shape = list(shape)
    for axis in axes:
        if axis.name in split:
            dim = split[axis.name]
            start, stop = chunk_bounds(local_shape[dim], axis)
            local_shape[dim] = stop - start
    names = [axis.name for axis in axes]
    devices = mesh.expert_devices if "expert" in names else mesh.devices
    return DTensor.from_local(
        torch.empty(local_shape, device="meta", dtype=dtype),
        devices(*names),
        [Shard(split[name]) if name in split else Replicate() for name in names],
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )
