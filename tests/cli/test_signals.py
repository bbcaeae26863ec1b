"""Ctrl-C and SIGTERM end a command by an exception, and never in mid-import."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from repvgg_deploy.cli.signals import raise_signals

RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """Those of a new process, whatever pytest or the shell has set."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", RAISED)
def test_a_signal_is_raised_where_the_main_thread_is(number: signal.Signals) -> None:
    with pytest.raises(RAISED[number]) as raised, raise_signals():
        os.kill(os.getpid(), number)
    assert number == signal.SIGINT or raised.value.code == 143


@pytest.mark.parametrize("number", RAISED)
def test_a_signal_in_mid_import_waits_until_the_module_is_whole(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"slow_to_import_{number.name}"
    (tmp_path / f"{name}.py").write_text(
        f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(0.1)\nis_whole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    start = time.monotonic()

    def command() -> None:
        with raise_signals():
            __import__(name)
            time.sleep(20)

    with pytest.raises(RAISED[number]):
        command()
    assert sys.modules.pop(name).is_whole
    assert time.monotonic() - start < 10


def test_handlers_are_put_back_and_those_of_others_are_left_alone() -> None:
    received: list[int] = []

    def own(number: int, _frame: object) -> None:
        received.append(number)

    signal.signal(signal.SIGTERM, own)
    with raise_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is own
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


class SlowLock:
    """A lock that a signal reaches just after it was taken, before its caller knows."""

    def __init__(self, number: int) -> None:
        self.number, self.is_taken = number, False

    def __enter__(self) -> bool:
        self.is_taken = True
        os.kill(os.getpid(), self.number)
        time.sleep(0.01)
        return True

    def __exit__(self, *_: object) -> None:
        self.is_taken = False

    def acquire(self) -> bool:
        return self.__enter__()

    def release(self) -> None:
        self.__exit__()


@pytest.mark.parametrize("number", RAISED)
def test_a_signal_inside_a_lock_of_the_library_waits_until_it_can_be_released(number: signal.Signals) -> None:
    lock = SlowLock(number)
    condition = threading.Condition(lock)  # type: ignore[arg-type]
    entered = False

    def command() -> None:
        nonlocal entered
        with raise_signals():
            with condition:
                entered = True
            time.sleep(20)

    with pytest.raises(RAISED[number]):
        command()
    assert entered
    assert not lock.is_taken


@pytest.mark.parametrize("number", RAISED)
def test_a_signal_ends_a_wait_for_a_thread(number: signal.Signals) -> None:
    event = threading.Event()
    timer = threading.Timer(0.1, os.kill, (os.getpid(), number))
    start = time.monotonic()

    def command() -> None:
        with raise_signals():
            timer.start()
            event.wait(20)

    with pytest.raises(RAISED[number]):
        command()
    timer.join()
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("number", RAISED)
def test_an_error_that_a_library_makes_of_a_signal_is_the_signal(number: signal.Signals) -> None:
    def call_back() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(20)
        except BaseException as error:
            raise ValueError("could not determine the shape") from error

    with pytest.raises(RAISED[number]), raise_signals():
        call_back()
    with pytest.raises(ValueError, match="its own"), raise_signals():
        raise ValueError("its own")
