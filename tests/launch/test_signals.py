import os
import signal
import subprocess
import sys
import threading

import pytest

from lasp.launch.run.signals import SignalCount, blocked, handled


def _send(number):
    os.kill(os.getpid(), number)


def test_signals_are_counted_in_the_block_and_the_handlers_come_back():
    before, told = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], []
    with SignalCount(told.append) as signals:
        assert signals.count == 0
        _send(signal.SIGTERM)
        _send(signal.SIGINT)
    assert signals.count == 2 and told == [1, 2]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_what_a_handler_raises_is_raised_in_the_block():
    def stop():
        raise InterruptedError("enough")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedError, match="enough"), handled(stop, [signal.SIGTERM]):
        _send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_than_the_main_one_leaves_signals_as_they_are():
    seen = []

    def work():
        with SignalCount():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_a_blocked_signal_waits_and_a_process_started_meanwhile_never_gets_it():
    with SignalCount() as signals:
        with blocked() as before:
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # of a process with threads any may get it
            code = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"
            child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
            assert signals.count == 0
        assert signals.count == 1 and signal.pthread_sigmask(signal.SIG_BLOCK, set()) == before
    assert child.stdout == "alive\n"
