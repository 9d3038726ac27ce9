"""What each use of a unit computes again: between a plan's stretches of blocks and the chain's
instances, checked against the lowered units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

from llmspec.compiler.errors import Refused
from llmspec.compiler.graph import Instance, Unit
from llmspec.compiler.ops import collective
from llmspec.compiler.ops.registry import entry_of
from llmspec.compiler.plan import EVERYTHING, Stretch
from llmspec.dsl.diagnostics import Diagnostic, did_you_mean

Operators = tuple[str, ...] | str


def stretches(
    instances: Sequence[Instance], chosen: Sequence[Operators]
) -> dict[str, tuple[Stretch, ...]]:
    """By unit, neighbours with one choice together."""
    by_unit: dict[str, list[Operators]] = {}
    for instance, operators in zip(instances, chosen, strict=True):
        by_unit.setdefault(instance.unit, []).append(operators)
    return {
        name: tuple(Stretch(blocks=len(list(same)), again=again) for again, same in groupby(own))
        for name, own in by_unit.items()
    }


def by_instance(
    instances: Sequence[Instance], recompute: Mapping[str, Sequence[Stretch]]
) -> tuple[Operators, ...]:
    """The choice of each instance.

    Errors: Refused when a unit's stretches are not as many as its uses.
    """
    left: dict[str, list[Operators]] = {}
    for name in dict.fromkeys(i.unit for i in instances):
        uses = sum(i.unit == name for i in instances)
        of_each = [s.again for s in recompute.get(name, ()) for _ in range(s.blocks)]
        if len(of_each) != uses:
            raise _refused(f"the plan recomputes {len(of_each)} uses of `{name}`, it has {uses}")
        left[name] = of_each[::-1]
    return tuple(left[i.unit].pop() for i in instances)


def check_recompute(
    units: Mapping[str, Unit], instances: Sequence[Instance], recompute: Mapping[str, tuple]
) -> None:
    """`units`: lowered, on one rank's shapes.

    Errors: Refused for operators that a unit does not have, and for what stands alone in the chain.
    """
    for instance, operators in zip(instances, by_instance(instances, recompute), strict=True):
        if operators and not instance.prefix:
            raise _refused(f"`{instance.unit}` stands alone: only blocks are recomputed")
        if isinstance(operators, str):
            if operators != EVERYTHING:
                raise _refused(f'`{instance.unit}` recomputes "{EVERYTHING}" or a list')
            continue
        known = {n.name for n in units[instance.unit].calls() if runs(n)}
        for name in operators:
            if name not in known:
                message = f"the plan recomputes `{name}`, which `{instance.unit}` does not have"
                raise _refused(message, did_you_mean(name, known))


def lists_of(stretches: Sequence[Stretch]) -> tuple[tuple[str, ...], ...]:
    """The lists of operators that uses of a unit compute again; all of it is no list."""
    lists = (s.again for s in stretches if not isinstance(s.again, str))
    return tuple(dict.fromkeys(names for names in lists if names))


def in_words(unit: Unit, operators: Operators) -> list[str]:
    """For people: the operators of the language that compute again, `swiglu (gate, hidden)` where
    only values inside one do."""
    if isinstance(operators, str):
        return [operators]
    inside: dict[str, list[str]] = {}
    whole: dict[str, set[str]] = {}
    for node in unit.calls():
        if not runs(node):
            continue
        scope = node.meta["scope"]
        operator = scope[0] if scope else node.meta["label"]
        whole.setdefault(operator, set()).add(node.name)
        if node.name in operators:
            inside.setdefault(operator, []).append(node.name)
    labels = {n.name: str(n.meta["label"]) for n in unit.calls()}
    words = []
    for operator, names in inside.items():
        parts = ", ".join(dict.fromkeys(labels[n] for n in names))
        words.append(operator if set(names) == whole[operator] else f"{operator} ({parts})")
    return words


def runs(node) -> bool:  # type: ignore[no-untyped-def]
    """Whether a node makes bytes: views are part of what they view."""
    return collective.is_collective(node) or not entry_of(node).alias


def _refused(message: str, helps: tuple[str, ...] = ()) -> Refused:
    return Refused(Diagnostic(code="E0801", message=message, helps=helps))
