"""Run a function in forked ranks of one gloo group: `run(world, function, *args)`.

Forking takes 0.05 s and `torchrun` 3 s, so tests put many cases into one call.
"""

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

# Forked children must not inherit the threads of a parent that computed with many.
torch.set_num_threads(1)


def run(world: int, function: Callable, *args: Any, timeout_s: float = 120) -> list[Any]:
    """[function(rank, *args) for every rank], or AssertionError with the first rank's traceback.

    function: may be a closure, ranks are forked; what it returns is pickled.
    """
    context = get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks: dict[Any, tuple[int, BaseProcess]] = {}
        for rank in range(world):
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(
                target=_child, args=(sender, folder, rank, world, timeout_s, function, args)
            )
            child.start()
            sender.close()
            ranks[receiver] = (rank, child)
        try:
            return _collect(ranks, timeout_s)
        finally:
            for _, child in ranks.values():
                child.kill()
                child.join()


def _collect(ranks: dict[Any, tuple[int, BaseProcess]], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < len(ranks):
        pending = [receiver for receiver, (rank, _) in ranks.items() if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        missing = sorted(set(range(len(ranks))) - results.keys())
        if not ready:
            raise AssertionError(f"ranks {missing} did not end within {timeout_s} s")
        for receiver in ready:
            rank = ranks[receiver][0]
            try:
                error, results[rank] = receiver.recv()
            except EOFError:
                raise AssertionError(_died(ranks, receiver)) from None
            if error:
                # a rank whose peer is gone fails too, in words that depend on the moment
                for other in set(pending) - {receiver}:
                    if other.poll(1.0) and _is_closed(other):
                        raise AssertionError(_died(ranks, other))
                raise AssertionError(f"rank {rank}: {error}")
    return [results[rank] for rank in range(len(ranks))]


def _is_closed(receiver: Connection) -> bool:
    try:
        receiver.recv()
    except EOFError:
        return True
    return False


def _died(ranks: dict[Any, tuple[int, BaseProcess]], receiver: Connection) -> str:
    rank, child = ranks[receiver]
    return f"rank {rank}: died with exit code {_exit_code(child)}"


def _exit_code(child: BaseProcess) -> int | None:
    child.join(5)
    return child.exitcode


def _child(
    sender: Connection,
    folder: str,
    rank: int,
    world: int,
    timeout_s: float,
    function: Callable,
    args: tuple,
) -> None:
    torch.set_num_threads(1)
    error, result = "", None
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(os.path.join(folder, "store"), world),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=timeout_s),
        )
        result = function(rank, *args)
    except BaseException:
        error = traceback.format_exc()
    sender.send((error, result))
    sender.close()
    # no clean-up: a process group with a failed peer may never close
    os._exit(0)
