"""Search: from a checked program to the plan that is fastest and fits."""

from llmspec.compiler.search.search import Found, Infeasible, search

__all__ = ["Found", "Infeasible", "search"]
