"""The dialect's operators: importing this package fills the registry."""

from llmspec.compiler.ops import (  # noqa: F401
    attention,
    context,
    context_attention,
    context_experts,
    dropout,
    elementwise,
    embedding,
    exchange,
    experts,
    linear,
    linear_loss,
    loss,
    norm,
    opaque,
    projection,
    routing,
    shape,
    turn,
    weights,
)
