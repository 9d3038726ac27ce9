"""`llmspec fit MODEL --on 8xH100`: a model of the library and a few words in, a spec out."""

from __future__ import annotations

import re

from llmspec.dsl.diagnostics import SpecError, did_you_mean, fault, shown
from llmspec.dsl.hardware import cluster_from_words
from llmspec.dsl.program import Span
from llmspec.dsl.sources import LIBRARY

MODEL = re.compile(r"^model[ \t]+([A-Za-z_][A-Za-z0-9_]*)[ \t]*=", re.MULTILINE)


def library_models() -> dict[str, str]:
    """Every ready model of the library -> the file to import."""
    found = {}
    for path in sorted(LIBRARY.glob("*.llmspec")):
        for name in MODEL.findall(path.read_text(encoding="utf-8")):
            found[name] = path.stem
    return found


def fit_text(model: str, *, on: str, tokens: int | None, batch: int | None) -> str:
    """Errors: SpecError."""
    known = library_models()
    if model not in known:
        span = Span("command line", 1, 1, 1, len(model) + 1)
        helps = did_you_mean(model, known, otherwise="the models are " + ", ".join(known))
        message = f"the library has no model `{shown(model)}`"
        error = fault("E0201", message, span, helps=helps)
        raise SpecError([error.diagnostic], {"command line": model})
    cluster = cluster_from_words(on)
    device = cluster.device
    node = "cpu" if device.kind == "cpu" else f'gpu("{device.name}")'
    lines = [f"    model = {model}", "    cluster = here", "    dataset = synthetic"]
    if tokens is not None:
        lines.append(f"    sequence_length = {tokens}")
    if batch is not None:
        lines.append(f"    batch = {batch} sequences")
    return (
        f"import {known[model]}\n\n"
        f"cluster here {{\n    node = {cluster.devices_per_node} * {node}\n"
        f"    nodes = {cluster.nodes}\n}}\n\n"
        "train fit {\n" + "\n".join(lines) + "\n}\n"
    )
