"""`python -m llmspec.compiler.cli` is `llmspec`."""

from llmspec.compiler.cli import main

main()
