"""The dialect's operators: importing this package fills the registry."""

from llmspec.compiler.ops import (  # noqa: F401
    attention,
    dropout,
    elementwise,
    embedding,
    linear,
    loss,
    norm,
    opaque,
    projection,
    shape,
    turn,
    weights,
)
