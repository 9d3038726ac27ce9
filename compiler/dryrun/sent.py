"""What a process hands to torch.distributed: kind, group size, bytes, how often, from where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from llmspec.compiler.dryrun.places import Place, Places

Key = tuple[str, int, int]
"""(kind, ranks of the group, bytes). Bytes are of the whole value: what an all-gather makes, a
reduce-scatter takes, an all-reduce holds; of an all-to-all and of a message what this rank gives
away."""


@dataclass(slots=True)
class Sent:
    """counted: how often each was sent; by_place: and from which line."""

    places: Places
    counted: Counter[Key] = field(default_factory=Counter)
    by_place: dict[Key, Counter[Place]] = field(default_factory=dict)

    def note(self, kind: str, ranks: int, tensor: Tensor) -> None:
        key = kind, ranks, tensor.numel() * tensor.element_size()
        self.counted[key] += 1
        self.by_place.setdefault(key, Counter())[self.places.now()] += 1

    def clear(self) -> None:
        self.counted.clear()
        self.by_place.clear()


KINDS = {
    # function of torch.distributed, newest name first -> (kind, which tensor holds the whole value)
    ("all_reduce",): ("all_reduce", 0),
    ("all_gather_single", "all_gather_into_tensor"): ("all_gather", 0),
    ("reduce_scatter_single", "reduce_scatter_tensor"): ("reduce_scatter", 1),
    ("all_to_all_single",): ("all_to_all", 1),
}


@contextmanager
def recorded(places: Places) -> Iterator[Sent]:
    """Everything that is sent inside by modules that are imported inside."""
    sent = Sent(places)
    with ExitStack() as stack:
        for names, (kind, index) in KINDS.items():
            name = next(n for n in names if hasattr(dist, n))
            noting = _noting(getattr(dist, name), kind, index, sent)
            stack.enter_context(mock.patch.object(dist, name, noting))
        batch = _noting_messages(dist.batch_isend_irecv, sent)
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", batch))
        yield sent


def _noting(plain: Callable[..., Any], kind: str, index: int, sent: Sent) -> Callable[..., Any]:
    def noting(*args: Any, **kwargs: Any) -> Any:
        every = (*args, *kwargs.values())
        group = next((a for a in every if isinstance(a, dist.ProcessGroup)), None)
        ranks = dist.get_world_size(group)
        if ranks > 1:
            sent.note(kind, ranks, [a for a in every if isinstance(a, Tensor)][index])
        return plain(*args, **kwargs)

    return noting


def _noting_messages(plain: Callable[..., Any], sent: Sent) -> Callable[..., Any]:
    def noting(operations: list[Any]) -> Any:
        for one in operations:
            if one.op is dist.isend:
                sent.note("send", dist.get_world_size(one.group), one.tensor)
        return plain(operations)

    return noting
