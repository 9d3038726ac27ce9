"""The hardware file with what was tuned in it: all else that stands there stays."""

from __future__ import annotations

from collections.abc import Sequence

from llmspec.compiler.calibrate.file import short
from llmspec.dsl import SpecError, format_text, syntax
from llmspec.dsl.kernels import kernels_of, kernels_text
from llmspec.dsl.sources import Sources
from llmspec.dsl.tuned import TunedKernel, TunedKernels


def with_tuned(
    text: str, path: str, name: str, kernels: Sequence[TunedKernel], says: Sequence[str]
) -> str:
    """`text`: of the file now, empty if there is none. Its section `name` keeps what was not
    measured again; clusters in it that name no kernels name these. says: comment lines.

    Errors: SpecError when the text is no spec."""
    sources = Sources()
    declarations = sources.load(path, text).file.declarations
    if sources.diagnostics:
        raise SpecError(sources.diagnostics, sources.texts)
    sections = [d for d in declarations if isinstance(d, syntax.Section)]
    old = next((s for s in sections if s.kind == "kernels" and s.name == name), None)
    new = section(merged(old, kernels), name, says)
    edits = [(*_place(text, s), _naming(text, s, name)) for s in sections if _unnamed(s)]
    if old is not None:
        edits.append((*_place(text, old), new))
    for start, end, instead in sorted(edits, reverse=True):
        text = text[:start] + instead + text[end:]
    if old is None:
        text = f"{text.rstrip()}\n\n{new}\n" if text.strip() else f"{new}\n"
    return format_text(text, path=path)


def merged(old: syntax.Section | None, kernels: Sequence[TunedKernel]) -> list[TunedKernel]:
    found = {k.identity: k for k in kernels_of(old).kernels} if old is not None else {}
    return list((found | {k.identity: k for k in kernels}).values())


def section(kernels: Sequence[TunedKernel], name: str, says: Sequence[str]) -> str:
    found = TunedKernels(name=name, kernels=tuple(kernels))
    head, rest = kernels_text(found, lambda rate: f"{short(rate / 1e9)} GB/s").split("\n", 1)
    return "\n".join([head, *(f"# {line}" for line in says), rest])


def _unnamed(one: syntax.Section) -> bool:
    keys = [s.key.text for s in one.body if isinstance(s, syntax.Setting)]
    return one.kind == "cluster" and "kernels" not in keys


def _naming(text: str, one: syntax.Section, name: str) -> str:
    start, end = _place(text, one)
    return f"{text[start : end - 1].rstrip()}\nkernels = {name}\n}}"


def _place(text: str, one: syntax.Section) -> tuple[int, int]:
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    span = one.span
    return starts[span.line - 1] + span.column - 1, starts[span.end_line - 1] + span.end_column - 1
