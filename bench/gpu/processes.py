"""Measurements in processes of their own: memory is its own, and a crash costs its rows alone.

A module prints each row as soon as it has it (`say`); a row that comes again takes the place of the
one before with the same `case` and `name`. What is over its time is ended, with all that it began.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

Row = dict[str, Any]
MARK = "row: "


def say(row: Row) -> None:
    print(MARK + json.dumps(row), flush=True)


def rows_of(module: str, arguments: list[str], timeout_s: float) -> Iterator[Row]:
    """What it says; last `{"failed": …}` if it does not end well, or not in time."""
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    yield from rows_of_command([sys.executable, "-m", module, *arguments], environment, timeout_s)


def rows_of_command(
    command: list[str], environment: dict[str, str], timeout_s: float
) -> Iterator[Row]:
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        late = threading.Event()

        def stop() -> None:
            late.set()
            end(process)

        timer = threading.Timer(timeout_s, stop)
        timer.start()
        try:
            assert process.stdout is not None, "it is a pipe"
            for line in process.stdout:
                if line.startswith(MARK):
                    yield json.loads(line.removeprefix(MARK))
            process.wait()
        finally:
            timer.cancel()
            end(process)
        if late.is_set():
            yield {"failed": f"not done in {timeout_s:.0f} s"}
        elif process.returncode:
            errors.seek(0)
            yield {"failed": last_words(errors.read()) or f"status {process.returncode}"}


def end(process: subprocess.Popen[str]) -> None:
    """With every process that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_words(text: str) -> str:
    """The line that names an exception, the last one, or else the last line."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.split(":")[0]]
    return (named or lines or [""])[-1][-400:]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
