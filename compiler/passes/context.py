"""Split tokens over context ranks: the graph of one of them.

before: a graph on whole sequences
after:  a graph on one rank's tokens, in which whatever needs other ranks' tokens is an operator
        that fetches them
"""

from __future__ import annotations

from llmspec.compiler.errors import InternalError
from llmspec.compiler.graph import ModelGraph

STYLES = ("ring", "ulysses", "gather")


def possible_styles(graph: ModelGraph, ranks: int) -> tuple[str, ...]:
    """In which styles `ranks` can share the model's sequences; none when they cannot."""
    return ()


def split_context(graph: ModelGraph, ranks: int, style: str) -> ModelGraph:
    """Errors: InternalError for a style that is not possible."""
    raise InternalError(f"{ranks} context ranks cannot share {graph.name} by {style}")
