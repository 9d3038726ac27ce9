import os
import signal

import pytest

from llmspec.runtime import interrupts
from llmspec.runtime.interrupts import Interrupts


def test_the_first_signal_is_a_wish():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as asked:
        assert not asked.asked
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.asked
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's echo of the same Ctrl-C
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_later_signal_ends_the_process(number: int, monkeypatch):
    monkeypatch.setattr(interrupts, "ECHO_S", -1.0)
    child = os.fork()
    if child == 0:
        with Interrupts():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
