"""Initial values as functions of seed, name and position; each rank fills its own part."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from . import random
from .mesh import Mesh
from .parameters import traits

# Numbers made at a time: on CPUs 2 MiB of float64, which stays in the cache; on GPUs enough that
# launching kernels is not what takes the time.
_CPU_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 23


@dataclass(frozen=True, slots=True, kw_only=True)
class Normal:
    mean: float = 0.0
    std: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """`init`, but with these rows (of dim 0) zero: padding tokens of an embedding."""

    init: "Init"
    zero_rows: tuple[int, ...]


Init = Normal | Uniform | Constant | Rows


def initialise(model: nn.Module, mesh: Mesh, seed: int, *, on_host: bool = False) -> None:
    """Give every parameter memory on mesh.device, and its values; also buffers with `traits`.

    Call it after sharding: no rank ever holds more than its part.
    on_host: parameters get host memory instead.
    """
    wanted = traits(model)
    made: dict[int, nn.Parameter | Tensor] = {}
    for prefix, module in model.named_modules():
        for members in (module._parameters, module._buffers):
            for name, old in members.items():
                full_name = f"{prefix}.{name}" if prefix else name
                if old is None:
                    continue
                if id(old) not in made:
                    on_cpu = on_host and isinstance(old, nn.Parameter)
                    home = torch.device("cpu") if on_cpu else mesh.device
                    made[id(old)] = _materialise(old, home)
                    if full_name in wanted:
                        init = wanted[full_name].init
                        _fill(made[id(old)], init, seed, full_name, mesh.device)
                    elif old.is_meta:
                        raise RuntimeError(f"{full_name} has no values and no way to make them")
                # tied names stay one tensor; `to_empty` would part them
                members[name] = made[id(old)]  # type: ignore[assignment]


def fill(
    local: Tensor,
    global_shape: tuple[int, ...],
    offsets: tuple[int, ...],
    init: Init,
    seed: int,
    name: str,
) -> None:
    """Write the block of the whole tensor that begins at `offsets` into local (contiguous)."""
    match init:
        case Constant():
            local.fill_(init.value)
        case Normal():
            for part, index in chunks(local, global_shape, offsets):
                part.copy_(random.normal(seed, name, index).mul_(init.std).add_(init.mean))
        case Uniform():
            for part, index in chunks(local, global_shape, offsets):
                width = init.high - init.low
                part.copy_(random.uniform(seed, name, index).mul_(width).add_(init.low))
        case Rows():
            fill(local, global_shape, offsets, init.init, seed, name)
            for row in init.zero_rows:
                if 0 <= row - offsets[0] < local.shape[0]:
                    local[row - offsets[0]].zero_()


def block_offsets(p: DTensor) -> tuple[int, ...]:
    """Where the local block begins in the whole tensor.

    FSDP2 cuts what the tensor ranks' cut has left, so inner mesh dims are applied first. Each cut
    is torch.chunk's.
    """
    offsets, block = [0] * p.ndim, list(p.shape)
    coordinate = p.device_mesh.get_coordinate()
    assert coordinate is not None, "the parameter lives on other ranks"
    for mesh_dim in reversed(range(p.device_mesh.ndim)):
        dim = getattr(p.placements[mesh_dim], "dim", None)
        if dim is None:
            continue
        chunk = -(-block[dim] // p.device_mesh.size(mesh_dim))
        start = min(coordinate[mesh_dim] * chunk, block[dim])
        offsets[dim] += start
        block[dim] = min(chunk, block[dim] - start)
    assert math.prod(block) == p._local_tensor.numel(), f"{p.placements} is not cut by chunks"
    return tuple(offsets)


def _materialise(old: Tensor, device: torch.device) -> nn.Parameter | Tensor:
    if not old.is_meta:
        return old if isinstance(old, nn.Parameter) else old.to(device)
    new = torch.empty_like(old, device=device)
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new


@torch.no_grad()
def _fill(p: Tensor, init: Init, seed: int, name: str, device: torch.device) -> None:
    """The numbers are made on `device`, wherever p lives."""
    part = p._local_tensor if isinstance(p, DTensor) else p
    offsets = block_offsets(p) if isinstance(p, DTensor) else (0,) * p.ndim
    near = part if part.device == device else torch.empty_like(part, device=device)
    fill(near, tuple(p.shape), offsets, init, seed, name)
    if near is not part:
        part.copy_(near)


def chunks(
    local: Tensor, global_shape: tuple[int, ...], offsets: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(flat part of local, its flat positions in the whole tensor), _CHUNK numbers at a time."""
    flat = local.view(-1)
    chunk = _CPU_CHUNK if local.device.type == "cpu" else _GPU_CHUNK
    dims = _merged(tuple(local.shape), global_shape, offsets)
    for start in range(0, flat.numel(), chunk):
        rest = torch.arange(start, min(start + chunk, flat.numel()), device=local.device)
        index, stride = torch.zeros_like(rest), 1
        for local_size, whole_size, offset in reversed(dims):
            index += (rest % local_size + offset) * stride
            rest = rest // local_size
            stride *= whole_size
        yield flat[start : start + chunk], index


def _merged(
    local_shape: tuple[int, ...], global_shape: tuple[int, ...], offsets: tuple[int, ...]
) -> list[tuple[int, int, int]]:
    """(local size, whole size, offset) per dim, where whole inner dims join the one outside."""
    dims: list[tuple[int, int, int]] = []
    for local, whole, offset in zip(local_shape, global_shape, offsets, strict=True):
        if dims and local == whole:
            outer_local, outer_whole, outer_offset = dims.pop()
            dims.append((outer_local * local, outer_whole * whole, outer_offset * whole))
        else:
            dims.append((local, whole, offset))
    return dims
