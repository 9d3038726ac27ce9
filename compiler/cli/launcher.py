"""torchrun for `llmspec train`: what the program said about its end stands alone.

torchrun ends with a traceback of its own when a process ends with a status or it is told to stop.
"""

from __future__ import annotations

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from llmspec.compiler.cli.console import status


def main() -> int:
    """128 + its number after a signal, as shells have it; 1 if a process failed."""
    try:
        run.main()
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        if first.exitcode < 0:  # nobody else could say so: the process had no time to
            status("Failed", f"process {rank} was ended by {first.signal_name()}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
