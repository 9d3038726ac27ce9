"""Verbs that need nothing but the language: new, check, fmt, explain."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from llmspec import dsl
from llmspec.compiler.cli.console import (
    CHANGED,
    OK,
    fault,
    product,
    product_json,
    show_faults,
    status,
)

STARTER = """\
# What is trained, where, and within which budget. How is the compiler's answer: llmspec plan {name}

import llama

model tiny = llama(layers=4, width=192, heads=6, kv_heads=2, ffn=512, vocab=256, context=256)

# Two processes here; or: node = 8 * gpu("H100"); nodes = 4; network = 400 Gb/s per gpu
cluster here {{ node = 2 * cpu }}

train first {{
    model     = tiny
    cluster   = here
    dataset   = text("{{stdlib}}/*.py")  # or: tokens("data/*.bin"), synthetic()
    batch     = 16 sequences
    steps     = 250
    optimizer = adamw(lr=3e-3)
    precision = fp32
}}
"""


def new(options: Namespace) -> int:
    path = Path(options.path)
    if path.exists() and not options.force:
        return fault(f"`{path}` exists", "name another file, or add --force")
    if not path.parent.is_dir():
        return fault(f"there is no folder `{path.parent}`")
    path.write_text(STARTER.format(name=path.name))
    if options.json:
        product_json({"schema": 1, "written": str(path)})
    status("Wrote", f"{path}. Next: llmspec plan {path}")
    return OK


def check(options: Namespace) -> int:
    diagnostics = dsl.check(options.spec)
    if diagnostics:
        return show_faults(dsl.SpecError(diagnostics, {}), as_data=options.json)
    if options.json:
        product_json({"schema": 1, "diagnostics": []})
    status("Checked", options.spec)
    return OK


def fmt(options: Namespace) -> int:
    changed = []
    for name in options.specs:
        text = dsl.read_source(name)
        formatted = dsl.format_text(text, path=name)
        if formatted == text:
            continue
        changed.append(name)
        if not options.check:
            Path(name).write_text(formatted)
            status("Formatted", name)
    if options.json:
        product_json({"schema": 1, "changed": changed})
    if options.check and changed:
        for name in changed:
            status("Would change", name)
        return CHANGED
    return OK


def explain(options: Namespace) -> int:
    page = dsl.explain(options.code)
    if page is None:
        return fault(f"there is no error `{options.code}`", *dsl.nearest_codes(options.code))
    if options.json:
        product_json({"schema": 1, "code": options.code.upper(), "page": page})
    else:
        product(page)
    return OK
