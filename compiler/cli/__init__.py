"""The command line. `main` is the entry point of the `llmspec` script."""

from __future__ import annotations


def main() -> None:
    from llmspec.compiler.cli.main import main as run

    run()
