"""Lets torch.distributed send Python objects where NumPy is not installed.

PyTorch does not require NumPy, but its object collectives, which its checkpoints use too, read
received bytes through it.
"""

import importlib.util
import io
import sys
from typing import Any

import torch.distributed.distributed_c10d as c10d
from torch import Tensor


def send_without_numpy() -> None:
    """Does nothing where NumPy is. Private API: `_tensor_to_object` of torch 2.11 to 2.13."""
    if not _has_numpy():
        c10d._tensor_to_object = _tensor_to_object  # type: ignore[assignment]


def _has_numpy() -> bool:
    if "numpy" in sys.modules:
        return sys.modules["numpy"] is not None
    return importlib.util.find_spec("numpy") is not None


def _tensor_to_object(tensor: Tensor, tensor_size: int, group: Any) -> Any:
    """tensor: uint8, of which the first tensor_size are a pickled object."""
    received = bytes(tensor[: int(tensor_size)].tolist())
    return c10d._unpickler(io.BytesIO(received)).load()
