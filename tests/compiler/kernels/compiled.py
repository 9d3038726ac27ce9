"""Compile kernels of real models ahead of time, for GPUs that need not be here; print what each
takes of a multiprocessor. Run as a program of its own: the interpreter must be off."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmspec.compiler import driver
from llmspec.compiler.kernels.group import Group
from llmspec.compiler.passes.fuse import fuse_unit
from tests.compiler.kernels import interpreted
from tests.compiler.kernels.groups import Draft, groups_of, module_of
from tests.compiler.kernels.interpreted import arguments, directions, softmax_dropout
from tests.compiler.verify.models import MODELS, planned, spec_text

TARGETS = (80, 90, 100)
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64"}


class Recorder:
    """In a kernel's place: what it would be launched with."""

    def __init__(self) -> None:
        self.args: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self.args, self.options = args, options

        return launch


def recorded(module: ModuleType, name: str, given: list[Any]) -> Recorder:
    recorder, kernel = Recorder(), getattr(module, f"{name}_kernel")
    setattr(module, f"{name}_kernel", recorder)
    try:
        getattr(module, f"{name}_triton")(*given)
    finally:
        setattr(module, f"{name}_kernel", kernel)
    return recorder


def on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def compiled(kernel: Any, launch: Recorder, target: int) -> Any:
    names = kernel.arg_names
    signature: dict[str, str] = {}
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
    fixed = {n: v for n, v in launch.options.items() if n in names}
    signature |= dict.fromkeys(fixed, "constexpr")
    source = ASTSource(kernel, signature=signature, constexprs=fixed, attrs=aligned)
    return triton.compile(
        source,
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": launch.options["num_warps"]},
    )


def usage(binary: bytes) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {name: int(count) for name, count in re.findall(r"(\w+):(\d+)", said)}


WIDE = (
    (interpreted.rmsnorm, 8192),
    (interpreted.residual_rmsnorm, 8192),
    (interpreted.layernorm, 8192),
    (interpreted.dropout_residual_layernorm, 16_384),
    (interpreted.silu_gate, 8192),
    (interpreted.silu_gate, 53_248),
    (interpreted.bias_gelu, 16_384),
    (interpreted.bias_gelu, 128_256),
)
"""Rows of the largest models there are: widths, a Llama 3 405B's ffn, a vocabulary."""


def wide_groups() -> Iterator[tuple[ModuleType, Group, str]]:
    """At which width a kernel was looked at stands behind its name."""
    for graph, columns in WIDE:
        draft = Draft((1, 64, columns))
        fused = fuse_unit(draft.unit(graph(draft)))
        found = groups_of(fused)
        module = module_of(fused)
        for group in found.values():
            yield module, group, f" of {columns}"


def groups() -> Iterator[tuple[ModuleType, Group, str]]:
    yield from of_models()
    yield from wide_groups()


def of_models() -> Iterator[tuple[ModuleType, Group, str]]:
    seen: set[str] = set()
    for model in MODELS:
        session, plan = planned(spec_text(MODELS[model], 1, 8, "microbatch = 1", precision="bf16"))
        fused = fuse_unit(driver.lower_plan(session, plan).units["layer"])
        found = groups_of(fused)
        module = module_of(fused)
        for name, group in found.items():
            if name not in seen:
                seen.add(name)
                yield module, group, ""
    draft = Draft((1, 2, 2048, 2048))
    written = fuse_unit(draft.unit(softmax_dropout(draft)))
    yield module_of(written), *groups_of(written).values(), ""


def main(part: str) -> None:
    """part: of the names of the kernels that are compiled."""
    print(f"triton {triton.__version__}")
    for module, group, words in groups():
        if part not in f"{group.name}{words}":
            continue
        for one in directions(group):
            given = [on_meta(a) for a in arguments(one, group, torch.bfloat16, empty=True)]
            launch = recorded(module, one.name, given)
            for target in TARGETS:
                made = compiled(getattr(module, f"{one.name}_kernel"), launch, target)
                used = usage(made.asm["cubin"])
                print(
                    f"{one.name}{words} sm_{target} tile {launch.options['TILE_ROWS']} x "
                    f"{launch.options['TILE_COLUMNS']} warps {launch.options['num_warps']} "
                    f"registers {used['REG']} shared {made.metadata.shared} "
                    f"spilled {used['STACK'] + used['LOCAL']}",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
