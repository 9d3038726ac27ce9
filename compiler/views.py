"""What one rank sees of a model before operators are placed on the tensor axis: its tokens, its
experts, how many of its logits."""

from __future__ import annotations

from dataclasses import dataclass

from llmspec.compiler.graph import ModelGraph
from llmspec.compiler.passes.context import split_context
from llmspec.compiler.passes.experts import split_experts
from llmspec.compiler.passes.loss import join_loss
from llmspec.compiler.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """style: how attention looks over context ranks; None where there is one. loss_rows: how many
    rows of logits there are at once; None: all."""

    context: int = 1
    style: str | None = None
    expert: int = 1
    loss_rows: int | None = None


WHOLE_VIEW = View()


def view_of(plan: Plan) -> View:
    return View(
        context=plan.mesh.context,
        style=plan.context_style,
        expert=plan.mesh.expert,
        loss_rows=plan.loss_rows,
    )


def seen(graph: ModelGraph, view: View) -> ModelGraph:
    """The graph of one context and expert rank."""
    if view.loss_rows is not None:
        graph = join_loss(graph, view.loss_rows)
    if view.context > 1:
        assert view.style is not None, "context ranks share attention in some style"
        graph = split_context(graph, view.context, view.style)
    if view.expert > 1:
        graph = split_experts(graph, view.expert)
    return graph
