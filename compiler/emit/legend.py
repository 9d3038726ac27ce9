"""The letters of shapes that an emitted file uses, and how many of each there are."""

from __future__ import annotations

from llmspec.compiler.lower import Lowered

LETTERS = {
    "B": "sequences",
    "T": "tokens",
    "S": "tokens attended to",
    "D": "width",
    "H": "heads",
    "K": "key/value heads",
    "E": "head size",
    "F": "hidden width",
    "I": "heads x head size",
    "M": "head size of values",
    "N": "head size without positions",
    "O": "head size with positions",
    "Q": "rank of queries",
    "L": "rank of keys and values",
    "J": "key/value heads x head size",
    "V": "vocabulary",
    "C": "positions",
    "W": "tokens of all context ranks",
    "R": "rows: each expert's tokens",
    "X": "experts",
    "P": "experts of a token",
}

OVER = {"x": "expert"}
"""The axis over which a letter in lower case is split, when it is not the tensor axis."""


def _shared(ranks: int, letter: str, size: int) -> str:
    """Of how many tokens these are a context rank's."""
    order = ", early ones and late ones on each rank"  # runtime/context.py
    return f" ({ranks * size:_} over context{order})" if ranks > 1 and letter in "TS" else ""


def legend(lowered: Lowered) -> list[str]:
    """One entry a letter: what it counts, whole and on one rank."""
    ranks = lowered.plan.mesh.context
    whole: dict[str, int] = {}
    local: dict[str, int] = {}
    for name, unit in lowered.units.items():
        for node in lowered.whole.units[name].graph.nodes:
            for letter, size in zip(
                node.meta.get("dims", ""), node.meta.get("shape", ()), strict=False
            ):
                whole.setdefault(letter, size)
        for node in unit.graph.nodes:
            for letter, size in zip(
                node.meta.get("dims", ""), node.meta.get("shape", ()), strict=False
            ):
                if letter.islower():
                    local.setdefault(letter, size)
    parts = [
        f"{letter} {size:_} {LETTERS[letter]}{_shared(ranks, letter, size)}"
        for letter, size in whole.items()
        if letter in LETTERS
    ]
    parts += [
        f"{letter} {size:_} ({letter.upper()} over {OVER.get(letter, 'tensor')})"
        for letter, size in local.items()
    ]
    lines, line = [], "Shapes of one micro-batch on one process:"
    for part in parts:
        if len(line) + len(part) > 92:
            lines.append(line)
            line = "   "
        line += f" {part};"
    return [*lines, line.rstrip(";")]
