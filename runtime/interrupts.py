"""Turns Ctrl-C and a scheduler's SIGTERM into a wish that the training loop reads."""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

# One Ctrl-C may arrive twice: from the terminal, and from torchrun, which passes it on.
ECHO_S = 1.0


class Interrupts:
    """`asked` is true after the first signal; a later one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self._asked_at_s = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        if not self.asked:
            self.asked, self._asked_at_s = True, now_s
        elif now_s - self._asked_at_s > ECHO_S:
            os._exit(128 + number)
