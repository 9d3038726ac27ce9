"""Verify a plan: shrink it, emit its program, and compare one step with the reference."""

from __future__ import annotations

import tempfile
from pathlib import Path

from llmspec.compiler.driver import Session, compile_plan
from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.plan import Plan
from llmspec.compiler.verify.compare import Difference, Report
from llmspec.compiler.verify.run import verify_folder
from llmspec.compiler.verify.shrink import shrink

RAISED = 1e-9
"""What the loss and each gradient of the raised graph may differ by from the module's, relative."""


def verify_plan(session: Session, plan: Plan, *, largest: int = 2) -> tuple[Report, Plan]:
    """The report, and the shrunken plan that ran. `largest`: ranks that an axis keeps at most.

    Errors: ProcessFailed when a process of the program raises.
    """
    program, small = shrink(session.program, plan, largest)
    little = Session(program, session.trust)
    with tempfile.TemporaryDirectory() as folder:
        compile_plan(little, small, Path(folder))
        graph = little.graph(small.microbatch)
        reports = [
            verify_folder(folder, graph, small, seed=program.train.seed, rows=rows)
            for rows in (*(size for _, size in program.train.ramp_stages), None)
        ]
        report = Report(differences=tuple(d for r in reports for d in r.differences))
    if little.module is not None:
        report = Report(differences=(*report.differences, *raised_differences(little, graph)))
    return report, small


def raised_differences(session: Session, graph: ModelGraph) -> tuple[Difference, ...]:
    """The raised graph against the user's own module: the reference is as good as the raise."""
    # torch.export is heavy, and only models from PyTorch need it
    from llmspec.compiler.raising import check_raised

    assert session.module is not None, "only a model from PyTorch has a module"
    raised = check_raised(session.module, graph)
    loss = Difference(what="loss of the module itself", error=raised.loss / RAISED)
    return (
        loss,
        *(
            Difference(what=f"gradient of the module's {name}", error=error / RAISED)
            for name, error in raised.gradients.items()
        ),
    )
