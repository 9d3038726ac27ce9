"""From the plan's axis sizes and torchrun's environment to process groups: `start(...) -> Mesh`.

Rank order, outer to inner: pipeline, replicas, shards, context, tensor. Tensor is innermost.
Expert ranks are no axis of their own: a group of them is `expert` consecutive data ranks.
"""

import math
import os
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .errors import UserError

AXES = ("pipeline", "replicas", "shards", "context", "tensor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One axis of the mesh seen from one rank; `group` holds the ranks that differ only in it."""

    name: str
    rank: int
    size: int
    group: Any  # dist.ProcessGroup; its stubs differ between builds of torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """data = replicas x shards; reduction = data x context: all ranks that share a gradient sum.

    expert: the ranks that have a layer's experts between them. expert_data: the ranks with the same
    experts, which share the sum of an expert's gradient.
    experts: the ranks as (pipeline, expert_data, expert, tensor), where experts are split.
    """

    device: torch.device
    whole: DeviceMesh
    pipeline: Axis
    replicas: Axis
    shards: Axis
    context: Axis
    tensor: Axis
    data: Axis
    reduction: Axis
    expert: Axis
    expert_data: Axis
    world: Axis
    flat: dict[tuple[str, ...], DeviceMesh]
    experts: DeviceMesh | None

    @staticmethod
    def create(
        device: torch.device | str,
        *,
        pipeline: int = 1,
        replicas: int = 1,
        shards: int = 1,
        context: int = 1,
        expert: int = 1,
        tensor: int = 1,
    ) -> "Mesh":
        """Needs a running process group of exactly pipeline * replicas * ... ranks; the expert
        ranks are some of the data ranks, and divide them.
        """
        device = torch.device(device)
        sizes = (pipeline, replicas, shards, context, tensor)
        world = math.prod(sizes)
        if dist.get_world_size() != world:
            raise UserError(_wrong_world(dist.get_world_size(), sizes))
        whole = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
        flat: dict[tuple[str, ...], DeviceMesh] = {}
        experts = _expert_devices(device, sizes, expert) if expert > 1 else None
        reduction = _axis(whole, flat, "reduction", "replicas", "shards", "context")
        _axis(whole, flat, "parts", "shards", "context")  # for shard_devices
        return Mesh(
            device=device,
            whole=whole,
            **{name: _axis(whole, flat, name, name) for name in AXES},
            data=_axis(whole, flat, "data", "replicas", "shards"),
            reduction=reduction,
            expert=_expert_axis(experts, "expert")
            or Axis(name="expert", rank=0, size=1, group=None),
            expert_data=_expert_axis(experts, "expert_data")
            or replace(reduction, name="expert_data"),
            world=Axis(name="world", rank=dist.get_rank(), size=world, group=dist.group.WORLD),
            flat=flat,
            experts=experts,
        )

    def devices(self, *axes: str) -> DeviceMesh:
        """The submesh with these axes as its dims, for DTensor."""
        return self.whole[axes[0]] if len(axes) == 1 else self.whole[axes]

    def expert_devices(self, *axes: str) -> DeviceMesh:
        """The same of the mesh that splits experts."""
        assert self.experts is not None, "the plan has no expert ranks"
        return self.experts[axes[0]] if len(axes) == 1 else self.experts[axes]

    def shard_devices(self) -> DeviceMesh:
        """The mesh FSDP2 shards over: (shards x context), or (replicas, shards x context)."""
        parts = self.flat.get(("shards", "context"))  # as one dim
        if parts is None:
            inner = "context" if self.context.size > 1 else "shards"
            hybrid = self.replicas.size > 1
            return self.devices("replicas", inner) if hybrid else self.devices(inner)
        if self.replicas.size == 1:
            return parts
        return DeviceMesh._concatenate([self.devices("replicas"), parts])

    def close(self) -> None:
        dist.destroy_process_group()


def start(
    *,
    pipeline: int = 1,
    replicas: int = 1,
    shards: int = 1,
    context: int = 1,
    expert: int = 1,
    tensor: int = 1,
) -> Mesh:
    """Join the process group torchrun prepared (or be alone without torchrun) and lay the mesh."""
    sizes = (pipeline, replicas, shards, context, tensor)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world != math.prod(sizes):
        # every process sees the same fault; one of them speaks
        raise UserError(_wrong_world(world, sizes)) if rank == 0 else SystemExit(1)
    device = _device()
    if not dist.is_initialized():
        _join(rank, world, device)
    return Mesh.create(
        device,
        pipeline=pipeline,
        replicas=replicas,
        shards=shards,
        context=context,
        expert=expert,
        tensor=tensor,
    )


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _join(rank: int, world: int, device: torch.device) -> None:
    # Gloo stays beside NCCL: checkpoints and metrics reduce on the CPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    env = os.environ
    if "MASTER_ADDR" not in env:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    if int(env.get("LOCAL_WORLD_SIZE", world)) != world:
        # attempts are counted per machine, so machines may disagree about the prefix below
        dist.init_process_group(backend, rank=rank, world_size=world)
        return
    # torchrun keeps one store over restarts; without a prefix per attempt, a restarted process
    # reads the addresses of the dead one
    hosts_store = rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        env["MASTER_ADDR"],
        int(env["MASTER_PORT"]),
        world,
        is_master=hosts_store,
        wait_for_workers=False,
        timeout=timedelta(minutes=5),
    )
    attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"attempt{attempt}", store), rank=rank, world_size=world
    )


def _axis(whole: DeviceMesh, flat: dict, name: str, *axes: str) -> Axis:
    """One axis, or several read as one; an axis of size 1 among several adds nothing."""
    real = tuple(axis for axis in axes if _size(whole, axis) > 1) or axes[-1:]
    if len(real) == 1:
        devices = whole[real[0]]
    else:
        if real not in flat:
            flat[real] = whole[real]._flatten("_".join(real))
        devices = flat[real]
    return Axis(
        name=name, rank=devices.get_local_rank(), size=devices.size(), group=devices.get_group()
    )


def _expert_devices(device: torch.device, sizes: tuple[int, ...], expert: int) -> DeviceMesh:
    """A mesh of its own: DTensors and FSDP2 want their axes cut from one, and these cross the
    others'.
    """
    pipeline, replicas, shards, context, tensor = sizes
    data = replicas * shards
    assert data % expert == 0, f"{expert} expert ranks do not divide {data} data ranks"
    ranks = torch.arange(math.prod(sizes)).view(pipeline, -1, expert, context, tensor)
    return DeviceMesh(
        device.type,
        ranks.transpose(2, 3).flatten(1, 2),
        mesh_dim_names=("pipeline", "expert_data", "expert", "tensor"),
    )


def _expert_axis(experts: DeviceMesh | None, name: str) -> Axis | None:
    if experts is None:
        return None
    devices = experts[name]
    return Axis(
        name=name, rank=devices.get_local_rank(), size=devices.size(), group=devices.get_group()
    )


def _size(whole: DeviceMesh, axis: str) -> int:
    return whole.shape[AXES.index(axis)]


def _wrong_world(world: int, sizes: tuple[int, ...]) -> str:
    named = [f"{name} {size}" for name, size in zip(AXES, sizes, strict=True) if size > 1]
    return (
        f"the plan needs {math.prod(sizes)} processes ({' x '.join(named) or 'one'}), "
        f"but {world} {'was' if world == 1 else 'were'} started"
    )
