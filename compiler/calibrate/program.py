"""One emitted program on one device, for its steps alone: no checkpoint is read or written.

python -m llmspec.compiler.calibrate.program FOLDER     leaves log.jsonl there
"""

from __future__ import annotations

import importlib
import sys
from typing import Any
from unittest import mock


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    train: Any = importlib.import_module("train")
    nothing = mock.MagicMock()
    nothing.restore.return_value = None
    train.Checkpoints = lambda *rest, **more: nothing
    train.main()


if __name__ == "__main__":
    main(sys.argv[1])
