"""`tensor = 4, precision = fp32` in, as a question gives it; the program under these lines out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from llmspec.dsl import syntax
from llmspec.dsl.choices import read_call
from llmspec.dsl.diagnostics import Fault, SpecError, fault
from llmspec.dsl.hardware import equal_only
from llmspec.dsl.left_open import listed, said
from llmspec.dsl.legality import check_pins
from llmspec.dsl.pins import Pins
from llmspec.dsl.plans import BLOCK, checked, section_of
from llmspec.dsl.precisions import check_device, check_parts
from llmspec.dsl.program import Call, Program, Train
from llmspec.dsl.spell_out import OPEN


def program_under(text: str, program: Program) -> Program:
    """`text`: lines of a plan block, and what a train block may leave open, with commas or `;`
    between them. They stand in for the program's own about the same keys.

    Errors: SpecError, for what no plan of the program can keep too.
    """
    block = f"plan {{ {separated(text)} }}"
    section = section_of(block)
    settings = [s for s in section.body if isinstance(s, syntax.Setting) and s.key.text in OPEN]
    rest = replace(section, body=tuple(s for s in section.body if s not in settings))
    lines = checked(rest, block)
    keys = {line.key for line in lines}
    plan = (*lines, *(line for line in program.plan if line.key not in keys))
    try:
        trains = under(settings, program)
    except Fault as error:
        raise SpecError([error.diagnostic], {BLOCK: block}) from None
    pins = Pins(constraints=plan, model=program.model, cluster=program.cluster, train=program.train)
    if faults := check_pins(pins):
        raise SpecError([f.diagnostic for f in faults], {BLOCK: block})
    many = trains if len(trains) > 1 else ()
    return replace(program, plan=plan, train=trains[0], trains=many)


def separated(text: str) -> str:
    """With `;` for every comma that no bracket encloses."""
    depth, out = 0, ""
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        out += ";" if sign == "," and not depth else sign
    return out


def under(settings: list[syntax.Setting], program: Program) -> tuple[Train, ...]:
    """The ways that the training run may take then. Only what prices depend on is changed: the
    phases of the learning rate stay. Errors: Fault."""
    trains = list(program.trains or (program.train,))
    for setting in settings:
        calls = tuple(calls_of(setting))
        trains = [changed(train, setting.key.text, c) for train in trains for c in calls]
    for train in trains if settings else ():
        check_device(train.precision, program.cluster)
        check_parts(train.precision, train.optimizer)
    distinct: dict[tuple[str, ...], Train] = {}
    for train in trains:
        distinct.setdefault(said(train), train)
    return tuple(distinct.values())


def changed(train: Train, key: str, call: Call) -> Train:
    return replace(train, precision=call) if key == "precision" else replace(train, optimizer=call)


def calls_of(setting: syntax.Setting) -> Iterator[Call]:
    key = setting.key.text
    if setting.relation not in ("=", "in"):
        raise fault("E0402", f"`{key}` has no order", setting.span, "use `=` or `in [..]`")
    nodes = listed(setting) if setting.relation == "in" else (equal_only(setting),)
    for node in nodes:
        yield read_call(node, OPEN[key], key)
