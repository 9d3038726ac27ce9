"""Times every candidate of every kernel, and PyTorch's own operators beside them.

    python -m llmspec.compiler.tune.worker FOLDER

FOLDER holds `task.json` and a program: kernels.py and its runtime. Each measurement that is done is
a line on stdout; results go to `results.json`. Imports nothing but PyTorch and that program.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from llmspec.compiler.calibrate.clock import Clock

Task = dict[str, Any]
Seconds = Callable[[Callable[[], Any]], float]
COPIES_BYTES = 2**28
"""Operands are taken in turn from copies of so many bytes together, more than caches hold."""
MOST_COPIES = 8
HIDDEN_S = 2e-3
"""A GPU sleeps so long before a call that is timed: a launch takes the host some 50 us."""
ROUNDINGS = 8
"""Of the compute type: what results with another tile may be off by."""


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    task = json.loads(Path(folder, "task.json").read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock(device, task["seconds"], wait=lambda: None, hidden_s=HIDDEN_S)
    kernels: Any = importlib.import_module("kernels")
    fused: Any = importlib.import_module("runtime.fused")
    bench = Bench(kernels, fused, device, clock.seconds, clock.engine_s)
    found = [bench.case(case) for case in task["cases"]]
    Path(folder, "results.json").write_text(json.dumps(found))


@dataclass
class Bench:
    """kernels: the program's module; fused: its runtime's. seconds: of a call. engine_s: what
    autograd takes beside the operators of a backward."""

    kernels: Any
    fused: Any
    device: torch.device
    seconds: Seconds
    engine_s: Callable[[], float]

    def case(self, case: Task) -> Task:
        """Of both directions: the tile and its seconds, those by rule, and eager; None where
        PyTorch's operators could not run by themselves."""
        found: Task = {}
        for word in ("forward", "backward"):
            if case[word] is not None:
                found[word] = self.direction(case[word])
        eager = self.eager(case["eager"])
        for word, spent in zip(("forward", "backward"), eager, strict=True):
            if word in found:
                found[word]["eager_s"] = spent
        return found

    # -- the kernel

    def direction(self, one: Task) -> Task:
        launch = getattr(self.kernels, f"{one['name']}_triton")
        sets = copies(lambda: [made(a, self.device) for a in one["arguments"]] + one["scalars"])
        first = self.by_rule(one)
        others = [tuple(t) for t in one["tiles"] if tuple(t) != first]
        with self.tile(one, first):
            wanted = results(launch(*sets[0]))
        rule_s = self.timed(one, launch, sets, first, wanted)
        assert rule_s is not None, "it is compared with itself"
        best, best_s = first, rule_s
        for tile in others:
            best, best_s = self.better(one, launch, sets, tile, wanted, (best, best_s))
        for stages in one["stages"]:
            tile = (*best[:3], stages)
            best, best_s = self.better(one, launch, sets, tile, wanted, (best, best_s))
        return {"tile": list(best), "seconds": best_s, "rule_s": rule_s}

    def better(self, one: Task, launch: Any, sets: Any, tile: Any, wanted: Any, best: Any) -> Any:
        spent = self.timed(one, launch, sets, tile, wanted)
        return (tile, spent) if spent is not None and spent < best[1] else best

    def timed(
        self, one: Task, launch: Any, sets: list[Any], tile: Any, wanted: list[Tensor]
    ) -> float | None:
        """None for a tile that this GPU cannot hold, or whose results are others."""
        turn = cycle(sets)
        try:
            with self.tile(one, tile):
                right = near(results(launch(*sets[0])), wanted)
                return self.seconds(lambda: launch(*next(turn))) if right else None
        except Exception:  # Triton's own, of several kinds: no registers, no shared memory
            if tile == self.by_rule(one):
                raise
            return None
        finally:
            print(one["name"], flush=True)

    def by_rule(self, one: Task) -> tuple[int, int, int, int]:
        found = getattr(self.fused, one["rule"])(one["columns"])
        return found.rows, found.columns, found.warps, found.stages

    def tile(self, one: Task, tile: Any) -> Any:
        """The launcher finds this tile by its rule."""
        rows, wide, warps, stages = tile

        def rule(columns: int, measured: object = None) -> Any:
            return self.fused.Tile(rows, wide, warps, columns, stages)

        return mock.patch.object(self.kernels, one["rule"], rule)

    # -- PyTorch's own operators

    def eager(self, one: Task) -> tuple[float | None, float | None]:
        names: dict[str, Any] = {"torch": torch, "F": F, "SEED": 1, "self": standing()}
        try:
            for module, name in one["imports"]:
                names[name] = getattr(importlib.import_module(module), name)
            return self._eager(one, names)
        except (AttributeError, NameError, RuntimeError, TypeError, ValueError) as error:
            print(f"eager: {error}", file=sys.stderr)
            return None, None
        finally:
            print("eager", flush=True)

    def _eager(self, one: Task, names: dict[str, Any]) -> tuple[float, float | None]:
        def inputs() -> dict[str, Tensor]:
            return {i["name"]: leaf(made(i, self.device)) for i in one["inputs"]}

        sets = copies(inputs)
        turn = cycle(sets)
        forward = code(one["forward"])
        forward_s = self.seconds(lambda: run(forward, names, next(turn)))
        backward, graphs = code(one["statements"]), []
        for given in sets:
            values = run(backward, names, given)
            outs = [values[n] for n in one["results"]]
            leaves = [v for v in given.values() if v.requires_grad]
            graphs.append((outs, leaves, [torch.randn_like(o) for o in outs]))
        again = cycle(graphs)

        def back() -> Any:
            outs, leaves, gradients = next(again)
            return torch.autograd.grad(
                outs, leaves, gradients, retain_graph=True, allow_unused=True
            )

        return forward_s, max(0.0, self.seconds(back) - self.engine_s())


def standing() -> SimpleNamespace:
    """What printed operators read of the module that they stand in."""
    axis = SimpleNamespace(rank=0)
    return SimpleNamespace(first_dropout=0, training=True, tensor=axis, context=axis)


def code(statements: list[list[str]]) -> list[tuple[str, Any]]:
    return [(name, compile(text, name, "eval")) for name, text in statements]


def run(statements: list[tuple[str, Any]], names: dict[str, Any], given: Any) -> dict[str, Any]:
    values = dict(given)
    for name, one in statements:
        values[name] = eval(one, names, values)
    return values


# --------------------------------------------------------------------------------------------------
# Values


def made(one: Task, device: torch.device) -> Tensor:
    shape = one["shape"]
    if "times" in one:
        return torch.arange(math.prod(shape), device=device).view(shape) * one["times"]
    value = torch.randn(shape, device=device, dtype=getattr(torch, one["dtype"]))
    return value + one["raised"]


def leaf(value: Tensor) -> Tensor:
    return value.requires_grad_() if value.is_floating_point() else value


def copies(make: Callable[[], Any]) -> list[Any]:
    """So many that no cache holds them together."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in tensors(first))
    count = max(1, min(MOST_COPIES, COPIES_BYTES // max(size, 1)))
    return [first, *(make() for _ in range(count - 1))]


def tensors(value: Any) -> Iterator[Tensor]:
    for one in value.values() if isinstance(value, dict) else value:
        if isinstance(one, Tensor):
            yield one


def results(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def near(got: list[Tensor], wanted: list[Tensor]) -> bool:
    for a, b in zip(got, wanted, strict=True):
        far = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
        if not float(far) <= ROUNDINGS * torch.finfo(a.dtype).eps:
            return False
    return True


if __name__ == "__main__":
    main(sys.argv[1])
