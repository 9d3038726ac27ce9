"""Lets torch.distributed.checkpoint write and read blocks of whole tensors.

It knows DTensors itself, but on a mesh of shards and tensor ranks with uneven cuts only
`initialise.block_offsets` says where a local block lies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    ChunkStorageMetadata,
    DefaultLoadPlanner,
    DefaultSavePlanner,
    LoadPlan,
    SavePlan,
    WriteItem,
)
from torch.distributed.checkpoint.metadata import (
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from .initialise import block_offsets


@dataclass(frozen=True, slots=True)
class Block:
    """local: shares memory with the tensor it is of. offsets: its first element in the whole."""

    local: Tensor
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor, beside: Tensor | None = None) -> "Block":
        """beside: the parameter that this is state of; a plain part of it lies as it does."""
        if isinstance(beside, DTensor) and not isinstance(tensor, DTensor) and tensor.ndim:
            return Block(tensor.detach(), tuple(beside.shape), block_offsets(beside))
        shape = tuple(tensor.shape)
        if isinstance(tensor, DTensor):
            return Block(tensor._local_tensor.detach(), shape, block_offsets(tensor))
        return Block(tensor.detach(), shape, (0,) * tensor.ndim)

    def copied_to_cpu(self) -> "Block":
        return Block(self.local.to("cpu", copy=True), self.shape, self.offsets)

    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(
            offsets=torch.Size(self.offsets), sizes=torch.Size(self.local.shape)
        )


def save(blocks: Mapping[str, Block], folder: Path, group: Any) -> None:
    writer = dcp.FileSystemWriter(folder)
    dcp.save(
        _tensors(blocks), storage_writer=writer, planner=SaveBlocks(blocks), process_group=group
    )


def load(blocks: Mapping[str, Block], folder: Path, group: Any) -> None:
    """In place."""
    reader = dcp.FileSystemReader(folder)
    dcp.load(
        _tensors(blocks), storage_reader=reader, planner=LoadBlocks(blocks), process_group=group
    )


def _tensors(blocks: Mapping[str, Block]) -> dict[str, Tensor]:
    """The module wants a state of tensors; the planners know more about them."""
    return {name: block.local for name, block in blocks.items()}


class SaveBlocks(DefaultSavePlanner):
    """Equal blocks of several ranks are written once."""

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.blocks = blocks

    def create_local_plan(self) -> SavePlan:
        items = [_write_item(name, b) for name, b in self.blocks.items() if b.local.numel() > 0]
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.blocks[index.fqn].local


class LoadBlocks(DefaultLoadPlanner):
    """Fills local blocks from whatever blocks were saved."""

    def __init__(self, blocks: Mapping[str, Block]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.blocks = blocks

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None, "set_up_planner comes first"
        items = []
        for name, block in self.blocks.items():
            saved = self.metadata.state_dict_metadata[name]
            assert isinstance(saved, TensorStorageMetadata), f"{name} was not saved as a tensor"
            if block.local.numel() > 0:
                items += create_read_items_for_chunk_list(name, saved, [block.chunk()])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.blocks[index.fqn].local


def _write_item(name: str, block: Block) -> WriteItem:
    data = TensorWriteData(
        chunk=block.chunk(),
        properties=TensorProperties.create_from_tensor(block.local),
        size=torch.Size(block.shape),
    )
    index = MetadataIndex(name, torch.Size(block.offsets))
    return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)
