"""The emitted directory, whole: the printed files, and the modules of the runtime that they use."""

from __future__ import annotations

import ast
from pathlib import Path

from llmspec.compiler.emit.kernels import kernel_files
from llmspec.compiler.emit.launch import print_launchers
from llmspec.compiler.emit.model import ModelPrinter
from llmspec.compiler.emit.report import print_report
from llmspec.compiler.emit.train import print_train
from llmspec.compiler.lower import Lowered
from llmspec.compiler.plan import to_json
from llmspec.compiler.precision import precision_of
from llmspec.dsl.program import Program

RUNTIME = Path(__file__).resolve().parents[2] / "runtime"
"""The folder whose modules travel with every program; read as text, never imported here."""


def _imported(source: str, inside: bool) -> set[str]:
    """Names of runtime modules that a source imports; `inside`: it is one of them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if inside and node.level == 1:
            found |= {module.split(".")[0]} if module else {a.name for a in node.names}
        elif not inside and module == "runtime":
            found |= {a.name for a in node.names}
        elif not inside and module.startswith("runtime."):
            found.add(module.split(".")[1])
    return found


def runtime_files(sources: list[str]) -> dict[str, str]:
    """The runtime modules that these sources need, directly or not: file name -> text."""
    todo = set().union(*(_imported(s, inside=False) for s in sources))
    files = {"__init__.py": (RUNTIME / "__init__.py").read_text()}
    todo |= _imported(files["__init__.py"], inside=True)
    while todo:
        name = todo.pop()
        if f"{name}.py" in files:
            continue
        files[f"{name}.py"] = (RUNTIME / f"{name}.py").read_text()
        todo |= _imported(files[f"{name}.py"], inside=True)
    return files


def emit(
    program: Program,
    lowered: Lowered,
    *,
    flops_per_token: float,
    times=None,
    freed=None,
    bytes_per_s: float | None = None,
) -> dict[str, str]:  # type: ignore[no-untyped-def]
    """Every file of the directory: relative path -> text. Same program and plan, same bytes."""
    train = program.train
    model = ModelPrinter(
        lowered=lowered,
        precision=precision_of(train),
        seed=train.seed,
        spec=lowered.plan.spec,
        times=times,
        freed=freed,
    ).print()
    files = {
        "model.py": model,
        "train.py": print_train(program, lowered, model_flops_per_token=flops_per_token),
        "plan.json": to_json(lowered.plan),
        **print_launchers(program, lowered.plan),
    }
    if lowered.plan.predicted:  # what nobody priced has no report
        files["report.html"] = print_report(program, lowered)
    files |= kernel_files(lowered, precision_of(train), bytes_per_s)
    runtime = runtime_files([text for name, text in files.items() if name.endswith(".py")])
    return files | {f"runtime/{name}": text for name, text in sorted(runtime.items())}


def write(files: dict[str, str], folder: Path) -> None:
    """Write the directory. Files of an earlier emission that are not part of it any more are
    removed;
    anything else there (checkpoints, logs) stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stale = {*(folder / "runtime").glob("*.py"), *folder.glob("*kernels.py")}
    stale -= {folder / f for f in files}
    for path in stale:
        path.unlink()
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        if path.suffix in (".sh", ".sbatch"):
            path.chmod(0o755)
