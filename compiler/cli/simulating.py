"""The verb that plays a plan's step: simulate."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from llmspec.compiler import driver
from llmspec.compiler.cli.console import OK, fault, product, product_json, status
from llmspec.compiler.cli.planning import of_a_plan
from llmspec.compiler.driver import Session
from llmspec.compiler.plan import Plan
from llmspec.compiler.simulate.step import simulate as simulate_plan
from llmspec.compiler.simulate.step import simulated_object
from llmspec.compiler.simulate.trace import trace_json
from llmspec.compiler.simulate.words import render_simulated


@of_a_plan
def simulate(options: Namespace, session: Session, plan: Plan) -> int:
    folder = driver.default_folder(session.program)
    path = Path(options.out) if options.out else folder / "trace.json"
    if options.out and not path.parent.is_dir():
        return fault(f"there is no folder `{path.parent}`")
    found = simulate_plan(session.program, plan, session.graph(plan.microbatch))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(trace_json(found))
    shown = simulated_object(found)
    if options.json:
        product_json(shown | {"trace": str(path)})
    else:
        product(render_simulated(shown))
    status("Traced", f"{path}: open it at https://ui.perfetto.dev or in chrome://tracing")
    return OK
