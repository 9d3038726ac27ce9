"""What a train block leaves to the search: `precision in [bf16, fp32]`, `optimizer in […]`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product

from llmspec.dsl import syntax
from llmspec.dsl.diagnostics import Fault, fault, shown
from llmspec.dsl.program import Program, Train
from llmspec.dsl.spell_out import OPEN, short_text
from llmspec.dsl.values import no_meaning

Nodes = dict[str, syntax.Node]


def listed(setting: syntax.Setting) -> tuple[syntax.Node, ...]:
    """The values of `key in [..]`. Errors: Fault where the key takes no list, or it is empty."""
    key, node = setting.key.text, setting.value
    if key not in OPEN:
        raise no_meaning(f"a choice of `{key}` left to the search", setting.span)
    if not isinstance(node, syntax.Sequence) or not node.items:
        raise fault("E0504", "`in` needs a list", node.span, f"what `{key}` may be")
    return node.items


def combinations(nodes: Nodes, choices: Mapping[str, tuple[syntax.Node, ...]]) -> Iterator[Nodes]:
    """The block's values, once for each combination of what is left open, in the order written."""
    for picked in product(*choices.values()):
        yield {**nodes, **dict(zip(choices, picked, strict=True))}


def said(train: Train) -> tuple[str, ...]:
    """What it is, of the keys that may be left open."""
    return tuple(short_text(getattr(train, key), key) for key in OPEN)


def check_distinct(trains: Iterable[Train]) -> None:
    """Errors: Fault where a list has a value twice."""
    seen: dict[tuple[str, ...], Train] = {}
    for train in trains:
        first = seen.setdefault(said(train), train)
        if first is train:
            continue
        for key, text in zip(OPEN, said(train), strict=True):
            before, again = getattr(first, key).span, getattr(train, key).span
            if before != again:
                raise fault(
                    "E0217",
                    f"`{shown(text)}` is in the list twice",
                    again,
                    "here again",
                    secondary=((before, "first here"),),
                )


def distinct_faults(faults: Iterable[Fault]) -> list[Fault]:
    """Combinations have much in common, and so have their faults."""
    return list({error.diagnostic: error for error in faults}.values())


# --------------------------------------------------------------------------------------------------


def left_open(program: Program) -> tuple[str, ...]:
    """The keys that the search decides."""
    return tuple(
        key
        for key in OPEN
        if len({short_text(getattr(train, key), key) for train in program.trains}) > 1
    )


def chosen_words(program: Program, train: Train) -> dict[str, str]:
    """What one of the program's trains is, of the keys that are left open: {"precision": "bf16"}"""
    return {key: short_text(getattr(train, key), key) for key in left_open(program)}


def settled(program: Program, words: Mapping[str, str]) -> Program | None:
    """With what is left open decided so; None where the spec does not offer that."""
    if not program.trains:
        return None if words else program
    for train in program.trains:
        if chosen_words(program, train) == dict(words):
            return replace(program, train=train, trains=())
    return None


def each_settled(program: Program) -> tuple[tuple[dict[str, str], Program], ...]:
    """Every way to decide what is left open, in the order written, and the program it makes."""
    return tuple(
        (chosen_words(program, train), replace(program, train=train, trains=()))
        for train in program.trains or (program.train,)
    )
