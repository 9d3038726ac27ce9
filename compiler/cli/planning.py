"""Verbs that search and emit: fit, plan, compile."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from llmspec import dsl
from llmspec.compiler import driver
from llmspec.compiler.cli.console import (
    CHANGED,
    DIAGNOSTICS,
    OK,
    fault,
    product,
    product_json,
    show_faults,
    status,
)
from llmspec.compiler.differences import differences, render_changes, render_differences
from llmspec.compiler.driver import Session
from llmspec.compiler.forecast import priced
from llmspec.compiler.ledger.items import memory_object
from llmspec.compiler.ledger.words import render_memory
from llmspec.compiler.plan import Plan, from_json, to_json
from llmspec.compiler.render_plan import (
    Face,
    face,
    infeasible_fault,
    render_found,
    render_plan,
)
from llmspec.compiler.render_tradeoffs import (
    front_face,
    render_front,
    render_why_not,
    why_not_face,
)
from llmspec.compiler.search.search import Found, Infeasible
from llmspec.compiler.search.tradeoffs import Front


def plan(options: Namespace) -> int:
    session = driver.open_session(options.spec, train=options.train, trust=options.trust)
    if options.explicit:
        text = dsl.explicit(session.program)
        if options.json:
            product_json({"schema": 1, "spec": text})
        else:
            product(text)
        return OK
    if options.pareto or options.why_not:
        return tradeoff(session, options)
    found = searched(session, options.spec)
    if isinstance(found, Infeasible):
        return no_plan(found, as_data=options.json)
    memory = memory_of(session, found.plan) if options.memory else None
    show(found, as_data=options.json, memory=memory)
    name_replicated(session, found.plan)
    if options.save:
        Path(options.save).write_text(to_json(found.plan))
        status("Saved", f"{options.save}. Next: llmspec compile {options.save}")
    return compare(options.check, found.plan) if options.check else OK


def tradeoff(session: Session, options: Namespace) -> int:
    """What is asked beside the plan: the front, or why not another."""
    if options.save or options.check:
        return fault("`--save` and `--check` are of the plan that is chosen, not of what is asked")
    status("Checked", options.spec)
    asked = options.why_not
    found = driver.ask_why_not(session, asked) if asked else driver.find_front(session)
    if isinstance(found, Infeasible):
        return no_plan(found, as_data=options.json)
    if isinstance(found, Front):
        return answer(front_face(found), render_front(found), as_data=options.json)
    return answer(why_not_face(asked, found), render_why_not(asked, found), as_data=options.json)


def answer(data: Face, text: str, *, as_data: bool) -> int:
    if as_data:
        product_json(data)
    else:
        product(text)
    return OK


def searched(session: Session, name: str) -> Found | Infeasible:
    status("Checked", name)
    found = driver.find_plan(session)
    status(
        "Searched",
        f"{found.considered:,} plans, pruned {found.pruned:,}, in {found.seconds:.1f} s"
        + (f", {found.fit:,} fit" if isinstance(found, Found) else ", none fits"),
    )
    return found


def name_replicated(session: Session, found: Plan) -> None:
    """What of a model from PyTorch could not be raised, and so runs whole on every tensor rank."""
    for where, what in session.graph(found.microbatch).replicated:
        status("Replicated", f"{where}: {what} (runs whole on every tensor rank)")


def compare(path: str, new: Plan) -> int:
    old = read_plan(path)
    if old.decisions() == new.decisions():
        status("Compared", f"{path}: no changes")
        return OK
    product(render_changes(old, new))
    return CHANGED


def read_plan(path: str) -> Plan:
    """As it stands: its spec is not asked for. Errors: Refused when it is no plan."""
    try:
        return from_json(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise driver.Refused(
            dsl.Diagnostic(code="E0801", message=f"`{path}` cannot be read as a plan: {error}")
        ) from None


def diff(options: Namespace) -> int:
    """Of two plans, each a saved one or what the search finds for a spec."""
    both: list[Plan] = []
    for path in (options.before, options.after):
        if driver.is_plan_file(path):
            both.append(read_plan(path))
            continue
        session = driver.open_session(path, train=options.train, trust=options.trust)
        found = searched(session, path)
        if isinstance(found, Infeasible):
            return no_plan(found, as_data=options.json)
        both.append(found.plan)
    made = differences(*both)
    if options.json:
        product_json(made)
    else:
        product(render_differences(made))
    return CHANGED if made["decisions"] or made["predicted"] else OK


def the_plan(options: Namespace) -> tuple[Session, Plan] | Infeasible:
    """From a spec by search, from a plan file as it stands."""
    if driver.is_plan_file(options.spec):
        return driver.open_plan(options.spec, trust=options.trust)
    session = driver.open_session(options.spec, train=options.train, trust=options.trust)
    found = searched(session, options.spec)
    return found if isinstance(found, Infeasible) else (session, found.plan)


Verb = Callable[[Namespace, Session, Plan], int]


def of_a_plan(verb: Verb) -> Callable[[Namespace], int]:
    """A verb that works on a plan, as one that takes a command line: where no plan fits it ends
    with saying so."""

    @wraps(verb)
    def run(options: Namespace) -> int:
        answer = the_plan(options)
        if isinstance(answer, Infeasible):
            return no_plan(answer, as_data=options.json)
        return verb(options, *answer)

    return run


def memory_of(session: Session, plan: Plan) -> dict[str, Any]:
    return memory_object(priced(session.program, plan, session.graph(plan.microbatch)))


def show(found: Found, *, as_data: bool, memory: dict[str, Any] | None = None) -> None:
    """`memory`: the ledger, item by item."""
    if as_data:
        product_json(face(found) | ({"memory": memory} if memory else {}))
        return
    product(render_found(found))
    if memory:
        product("\n" + render_memory(memory))


def no_plan(found: Infeasible, *, as_data: bool) -> int:
    if as_data:
        product_json(face(found))
        return DIAGNOSTICS
    return show_faults(driver.Refused(infeasible_fault(found)), as_data=False)


@of_a_plan
def compile_(options: Namespace, session: Session, found: Plan) -> int:
    folder = Path(options.out) if options.out else driver.default_folder(session.program)
    files = driver.compile_plan(session, found, folder)
    name_replicated(session, found)
    if options.json:
        product_json({"schema": 1, "folder": str(folder), "files": sorted(files)})
    lines = sum(t.count("\n") for n, t in files.items() if n in ("model.py", "train.py"))
    status("Emitted", f"{folder}: {lines} lines and the runtime. Next: sh {folder}/launch.sh")
    if not options.json:
        product(render_plan(found))
    return OK


def fit(options: Namespace) -> int:
    text = dsl.fit_spec(options.model, on=options.on, tokens=options.seq, batch=options.batch)
    session = Session(dsl.load(f"{options.model}.llmspec", text=text))
    found = searched(session, f"{options.model} on {options.on}")
    if isinstance(found, Infeasible):
        return no_plan(found, as_data=options.json)
    show(found, as_data=options.json)
    return OK
