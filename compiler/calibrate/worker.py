"""One process of a calibration: measures what its task lists, in step with the other processes.

    python -m llmspec.compiler.calibrate.worker FOLDER

FOLDER holds `task.json` and the runtime; each measurement that is done is a line on stdout, and the
results go to `rank{n}.json`. Imports nothing but PyTorch and that runtime.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from llmspec.compiler.calibrate.clock import Clock

Task = dict[str, Any]
COPIES_BYTES = 2**26
"""Operands are taken in turn from copies of so many bytes together: a program's are in no cache
when they are read again."""


def main(folder: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    task = json.loads(Path(folder, "task.json").read_text())
    sys.path.insert(0, folder)
    device = start(rank, world, folder)
    clock = Clock(device, task["seconds"], wait=dist.barrier if world > 1 else lambda: None)
    found: dict[str, Any] = {"device": describe(device)}
    for name, measure in MEASURES.items():
        found[name] = list(measure(task[name], clock, rank)) if name in task else []
    if device.type == "cuda":
        found["device"]["fixed_bytes"] = taken_bytes(device)
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def start(rank: int, world: int, folder: str) -> torch.device:
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return device


def describe(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": "cpu", "multiprocessors": 1, "threads": torch.get_num_threads()}
    known = torch.cuda.get_device_properties(device)
    return {
        "name": known.name,
        "multiprocessors": known.multi_processor_count,
        "memory_bytes": torch.cuda.mem_get_info(device)[1],
    }


def taken_bytes(device: torch.device) -> int:
    """What context, libraries and collectives hold beside PyTorch's allocator."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def done(rank: int, what: str) -> None:
    if rank == 0:
        print(what, flush=True)


# --------------------------------------------------------------------------------------------------
# Products, memory, launches


def products(cases: list[Task], clock: Clock, rank: int) -> Any:
    """Operations per second of x [rows, depth] times w [columns, depth], transposed."""
    for case in cases:
        dtype = getattr(torch, case["dtype"])
        torch.backends.cuda.matmul.allow_tf32 = case["tf32"]
        x = torch.randn(case["rows"], case["depth"], device=clock.device, dtype=dtype)
        w = torch.randn(case["columns"], case["depth"], device=clock.device, dtype=dtype)
        seconds = clock.seconds(lambda x=x, w=w: F.linear(x, w))  # type: ignore[misc]
        torch.backends.cuda.matmul.allow_tf32 = False
        done(rank, "products")
        yield {**case, "seconds": seconds}


def memory(cases: list[Task], clock: Clock, rank: int) -> Any:
    """A sum of two vectors into a third: two reads and a write."""
    for case in cases:
        a, b, out = torch.ones(3, case["bytes"] // 4, device=clock.device).unbind()
        seconds = clock.seconds(lambda a=a, b=b, out=out: torch.add(a, b, out=out))  # type: ignore[misc]
        done(rank, "memory")
        yield {**case, "seconds": seconds}


def launches(cases: list[Task], clock: Clock, rank: int) -> Any:
    """One operator on one number, in a row of many."""
    for case in cases:
        x = torch.ones(1, device=clock.device)

        def row(x: Tensor = x, count: int = case["count"]) -> None:
            for _ in range(count):
                x = x + 1.0

        seconds = clock.seconds(row) / case["count"]
        done(rank, "launches")
        yield {**case, "seconds": seconds}


def copies(cases: list[Task], clock: Clock, rank: int) -> Any:
    """From pinned host memory to the device."""
    for case in cases:
        host = torch.empty(case["bytes"], dtype=torch.uint8, pin_memory=True)
        there = torch.empty_like(host, device=clock.device)
        seconds = clock.seconds(
            lambda host=host, there=there: there.copy_(host, non_blocking=True)  # type: ignore[misc]
        )
        done(rank, "copies")
        yield {**case, "seconds": seconds}


# --------------------------------------------------------------------------------------------------
# Operators, as emitted programs call them


def operators(units: list[Task], clock: Clock, rank: int) -> Any:
    """Each call of each unit, on values that its calls before it have made."""
    for unit in units:
        dtype = getattr(torch, unit["dtype"])
        values = {i["name"]: made(i, dtype, clock.device) for i in unit["inputs"]}
        names: dict[str, Any] = {"torch": torch, "F": F}
        for module, name in unit["imports"]:
            names[name] = getattr(importlib.import_module(module), name) if module else None
        for call in unit["calls"]:
            code = compile(call["text"], call["name"], "eval")
            with torch.no_grad():
                values[call["name"]] = eval(code, names, values)
            if not call["measured"]:
                continue
            spent = forward_backward(code, names, values, call["reads"], clock)
            done(rank, "operators")
            yield {"key": call["key"], "forward_s": spent[0], "backward_s": spent[1]}


def made(one: Task, dtype: torch.dtype, device: torch.device) -> Tensor:
    if one["below"] is not None:
        return torch.randint(one["below"], one["shape"], device=device)
    return torch.randn(one["shape"], device=device, dtype=dtype) * one["scale"]


def forward_backward(
    code: Any, names: Task, values: dict[str, Tensor], reads: list[str], clock: Clock
) -> tuple[float, float]:
    """Seconds of one call and of its backward. Operands come in turn from several copies."""
    own = {name: values[name] for name in reads}
    size = sum(v.numel() * v.element_size() for v in own.values())
    count = max(1, min(16, COPIES_BYTES // max(size, 1)))
    sets = [{n: leaf(v) for n, v in own.items()} for _ in range(count)]
    turn = [0]

    def forward() -> Any:
        turn[0] = (turn[0] + 1) % count
        return eval(code, names, sets[turn[0]])

    forward_s = clock.seconds(forward)
    results = [eval(code, names, one) for one in sets]
    if not (isinstance(results[0], Tensor) and results[0].requires_grad):
        return forward_s, 0.0
    leaves = [[v for v in one.values() if v.requires_grad] for one in sets]
    gradients = [torch.randn_like(r) for r in results]

    def backward() -> Any:
        i = turn[0] = (turn[0] + 1) % count
        return torch.autograd.grad(
            results[i], leaves[i], gradients[i], retain_graph=True, allow_unused=True
        )

    return forward_s, max(0.0, clock.seconds(backward) - clock.engine_s())


def leaf(value: Tensor) -> Tensor:
    copy = value.detach().clone()
    return copy.requires_grad_() if copy.is_floating_point() else copy


# --------------------------------------------------------------------------------------------------
# The optimizer's step


def updates(cases: list[Task], clock: Clock, rank: int) -> Any:
    """The norm of all gradients, clipping, and AdamW."""
    optimizers: Any = importlib.import_module("runtime.optimizers")
    for case in cases:
        model = torch.nn.ParameterList(
            torch.randn(case["width"], case["width"], device=clock.device)
            for _ in range(case["count"])
        )
        for p in model:
            p.grad = torch.randn_like(p)
        optimizer = optimizers.adamw(model, lr=1e-4, weight_decay=0.1)

        def update(model: Any = model, optimizer: Any = optimizer) -> None:
            squares = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) ** 2 for p in model]
            scale = (1.0 / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_([p.grad for p in model], scale)
            optimizer.step()

        seconds = clock.seconds(update)
        done(rank, "updates")
        yield {**case, "elements": case["count"] * case["width"] ** 2, "seconds": seconds}


# --------------------------------------------------------------------------------------------------
# What stands around weights that ranks share


def weights(cases: list[Task], clock: Clock, rank: int) -> Any:
    """A use of a weight that tensor ranks have between them, and its gradient."""
    local: Any = importlib.import_module("runtime.parameters").local
    devices = init_device_mesh(clock.device.type, (dist.get_world_size(),))
    for case in cases:
        part = torch.ones(case["width"], case["width"], device=clock.device)
        p = torch.nn.Parameter(DTensor.from_local(part, devices, [Shard(0)], run_check=False))
        forward_s = clock.seconds(lambda p=p: local(p))  # type: ignore[misc]
        used, gradient = local(p), torch.ones_like(part)

        def backward(p: Any = p, used: Tensor = used, gradient: Tensor = gradient) -> Any:
            return torch.autograd.grad(used, (p,), gradient, retain_graph=True)

        spent = {"forward_s": forward_s, "backward_s": clock.seconds(backward) - clock.engine_s()}
        done(rank, "weights")
        yield {**case, **spent}


def units(cases: list[Task], clock: Clock, rank: int) -> Any:
    """Forward and backward of a chain of products, each a unit of FSDP2's, less those of the same
    chain without; of one unit."""
    for case in cases:
        spent = []
        for sharded in (True, False):
            width = case["width"]
            layers = [torch.nn.Linear(width, width, bias=False) for _ in range(case["count"])]
            model = torch.nn.Sequential(*layers).to(clock.device)
            if sharded:
                for unit in (*layers[:-1], model):  # the last layer is the root's own
                    fully_shard(unit)
            spent.append(steps_s(model, torch.ones(8, width, device=clock.device), clock))
        done(rank, "units")
        forward_s, backward_s = (
            max(0.0, with_it - without) / case["count"]
            for with_it, without in zip(*spent, strict=True)
        )
        yield {**case, "forward_s": forward_s, "backward_s": backward_s}


def steps_s(model: torch.nn.Module, x: Tensor, clock: Clock) -> tuple[float, ...]:
    """Seconds of forward and backward, which follow each other: the one gathers for the other."""
    results: list[Tensor] = []

    def forward() -> None:
        results.append(model(x))

    def backward() -> None:
        results.pop().sum().backward()

    return clock.in_turn_s(forward, backward)


# --------------------------------------------------------------------------------------------------
# Collectives


def collectives(cases: list[Task], clock: Clock, rank: int) -> Any:
    """Seconds of one collective over all processes; bytes as `cost.network.collective_s` counts."""
    world = dist.get_world_size()
    for case in cases:
        count = max(world, case["bytes"] // 4 // world * world)
        whole = torch.ones(count, device=clock.device)
        part = torch.ones(count // world, device=clock.device)
        seconds = clock.together_s(collective(case["kind"], whole, part, rank, world))
        done(rank, "collectives")
        yield {**case, "bytes": 4 * count, "seconds": seconds}


def collective(kind: str, whole: Tensor, part: Tensor, rank: int, world: int) -> Callable[[], Any]:
    out = torch.empty_like(part)
    match kind:
        case "all_reduce":
            return lambda: dist.all_reduce(whole)
        case "all_gather":
            return lambda: dist.all_gather_into_tensor(whole, part)
        case "reduce_scatter":
            return lambda: dist.reduce_scatter_tensor(part, whole)
        case "all_to_all":
            return lambda: dist.all_to_all_single(out, part)
    other = rank ^ 1  # neighbours in pairs; an odd one out waits

    def there_and_back() -> None:
        if other < world:
            first, second = (dist.send, dist.recv) if rank < other else (dist.recv, dist.send)
            first(whole, other)
            second(whole, other)

    return there_and_back


MEASURES: dict[str, Callable[[list[Task], Clock, int], Any]] = {
    "launches": launches,
    "products": products,
    "memory": memory,
    "operators": operators,
    "updates": updates,
    "collectives": collectives,
    "weights": weights,
    "units": units,
    "copies": copies,
}

if __name__ == "__main__":
    main(sys.argv[1])
