"""The verb that measures this machine: calibrate."""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from llmspec import dsl
from llmspec.compiler.cli.console import (
    DIAGNOSTICS,
    OK,
    fault,
    product,
    product_json,
    status,
)
from llmspec.dsl.units import render_bytes

if TYPE_CHECKING:
    from llmspec.compiler.calibrate.file import Hardware
    from llmspec.compiler.calibrate.run import Setting, Tell


def calibrate(options: Namespace) -> int:
    from llmspec.compiler.calibrate import run  # loads the whole compiler
    from llmspec.compiler.calibrate.file import text

    path = Path(options.path)
    refused = cannot_write(path, force=options.force) or cannot_name(path.stem)
    if refused:
        return fault(*refused)
    setting = run.setting_here(path.stem, options.processes)
    refused = cannot_start(options.processes, setting)
    if refused:
        return fault(*refused)
    try:
        with progress() as tell:
            found = run.calibrate(setting, tell)
    except run.CalibrationFailed as error:
        status("Failed", "a process that measured stopped")
        product(str(error))
        return DIAGNOSTICS
    try:
        path.write_text(text(found))
    except OSError as error:
        return fault(f"cannot write `{path}`: {error.strerror}")
    if options.json:
        written = {"written": str(path), "cluster": found.name, "devices": found.devices}
        product_json({"schema": 1, **written, "constants": constants(found)})
    else:
        product("\n".join(summary(found)))
    status("Wrote", f'{path}. In a spec: import "{path.name}", and cluster = {found.name}')
    return OK


def cannot_write(path: Path, *, force: bool) -> tuple[str, ...]:
    """Why not, and what helps: known before anything is measured."""
    if path.is_dir():
        return f"`{path}` is a folder", "name a file in it"
    if path.exists() and not force:
        return f"`{path}` exists", "name another file, or add --force"
    if not path.parent.is_dir():
        return (f"there is no folder `{path.parent}`",)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        return f"no permission to write `{path}`", "name a file in a folder of your own"
    return ()


def cannot_name(name: str) -> tuple[str, ...]:
    """The file's name is the cluster's."""
    try:
        if re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            dsl.format_text(f"cluster {name} {{ node = cpu }}\n", path=name)
            return ()
    except dsl.SpecError:  # a word of the language
        pass
    return f"`{name}` cannot be the name of a cluster", "name a file like `here.llmspec`"


def cannot_start(processes: int | None, setting: Setting) -> tuple[str, ...]:
    if processes is None:
        return ()
    if processes < 1:
        return (f"{processes} processes cannot measure anything",)
    if setting.gpu:
        import torch

        have = torch.cuda.device_count()
        if processes > have:
            gpus = "one GPU" if have == 1 else f"{have} GPUs"
            return (f"{processes} processes need as many GPUs; this machine has {gpus}",)
    return ()


@contextmanager
def progress() -> Iterator[Tell]:
    """A bar on stderr where that is a terminal."""
    columns = (
        TextColumn("{task.description:>12}", style="bold green"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("Starting", total=1)

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what.capitalize(), completed=done, total=total)

        yield tell


def constants(found: Hardware) -> dict[str, object]:
    return {
        "memory_bytes": found.memory_bytes,
        "memory_bytes_per_s": found.memory_bytes_per_s,
        "peak_flops": found.peaks,
        "launch_s": found.launch_s,
        "fixed_bytes": found.fixed_bytes,
        "multiprocessors": found.multiprocessors,
        "matmul_efficiency": found.matmul_efficiency,
        "attention_efficiency": found.attention_efficiency,
        "sustained": found.sustained,
        "link_bytes_per_s": found.link_bytes_per_s,
        "link_latency_s": found.link_latency_s,
        "host_link_bytes_per_s": found.host_link_bytes_per_s,
        "operators": found.operators,
        "collectives": found.collectives,
    }


def summary(found: Hardware) -> list[str]:
    products = ", ".join(f"{k} {v / 1e9:,.0f} GFLOP/s" for k, v in found.peaks.items())
    lines = [
        f"{found.name}: {found.devices} × {found.kind}",
        f"  products  {products}; the typical one {found.matmul_efficiency:.2f} of that",
        f"  memory    {render_bytes(found.memory_bytes)} at "
        f"{found.memory_bytes_per_s / 1e9:,.4g} GB/s; {render_bytes(found.fixed_bytes)} taken",
        f"  launch    {found.launch_s * 1e6:.3g} us",
    ]
    if found.link_bytes_per_s is not None:
        rate, latency = found.link_bytes_per_s / 1e9, found.link_latency_s * 1e6
        lines.append(f"  link      {rate:.3g} GB/s, {latency:.3g} us")
    return [*lines, f"  sustained {found.sustained:.2f} in a whole program"]
