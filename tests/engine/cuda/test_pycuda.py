"""`Cuda` through pycuda, with a driver module that keeps pycuda's rules: pycuda itself needs a GPU's driver."""

from __future__ import annotations

import atexit
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from repvgg_deploy.errors import DeployError

MODULE = "repvgg_deploy.engine.cuda.pycuda"


class Driver(ModuleType):
    """`pycuda.driver` with one GPU; `fails` is the error of every further call, `stack` that of its contexts."""

    class Error(Exception):
        pass

    class MemoryError(Error):
        pass

    def __init__(self) -> None:
        super().__init__("pycuda.driver")
        self.fails: Exception | None = None
        self.stack: list[object] = []
        self.detached = 0
        driver = self

        class Context:
            def push(self) -> None:
                driver.begin()
                driver.stack.append(self)

            def detach(self) -> None:
                driver.detached += 1

            @staticmethod
            def pop() -> None:
                if not driver.stack:
                    raise driver.Error("cannot pop non-current context")
                driver.stack.pop()

            @staticmethod
            def synchronize() -> None:
                driver.begin()

        class Device:
            def __init__(self, index: int) -> None:
                assert index == 0
                driver.begin()

            def retain_primary_context(self) -> Context:
                return Context()

        class Stream:
            def __init__(self, flags: int) -> None:
                driver.begin()
                self.flags, self.handle = flags, 77

            def synchronize(self) -> None:
                driver.begin()

        class Event:
            def __init__(self) -> None:
                driver.begin()

            def record(self, stream: Stream) -> None:
                driver.begin(stream)

            def synchronize(self) -> None:
                driver.begin()

            def time_till(self, end: Event) -> float:
                driver.begin(end)
                return 1.5

        class Allocation(int):
            def free(self) -> None:
                driver.begin()

        self.Context, self.Device, self.Stream, self.Event, self.Allocation = Context, Device, Stream, Event, Allocation

    def begin(self, *_: object) -> None:
        if self.fails is not None:
            raise self.fails

    def init(self) -> None:
        self.begin()

    def mem_alloc(self, size: int) -> Any:
        self.begin()
        return self.Allocation(4096 + size)

    def pagelocked_empty(self, size: int, dtype: Any) -> np.ndarray:
        self.begin()
        return np.empty(size, dtype)

    def memcpy_htod_async(self, *_: object) -> None:
        self.begin()

    def memcpy_dtoh_async(self, *_: object) -> None:
        self.begin()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    package, module = ModuleType("pycuda"), Driver()
    package.driver = module
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", module)
    return module


@pytest.fixture
def at_exit(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What was asked to be done at the end of the process."""
    asked: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", asked.append)
    return asked


@pytest.fixture
def library(driver: Driver, at_exit: list[Any]) -> Iterator[Any]:
    """The module of the package, imported with this driver."""
    del driver, at_exit
    before = sys.modules.pop(MODULE, None)
    yield importlib.import_module(MODULE)
    del sys.modules[MODULE]
    if before is not None:
        sys.modules[MODULE] = before


def test_the_context_is_entered_once_and_left_at_the_end(driver: Driver, at_exit: list[Any], library: Any) -> None:
    first, second = library.open_library(), library.open_library()
    assert len(driver.stack) == 1
    # In any order, and twice: another engine may still run.
    first.close()
    second.close()
    first.close()
    third = library.open_library()
    third.allocate(16)
    assert len(driver.stack) == 1
    # `third` was never closed. pycuda aborts a process that ends with a context on the stack.
    (leave,) = at_exit
    leave()
    assert not driver.stack
    assert not driver.detached


def test_another_thread_is_refused(driver: Driver, library: Any) -> None:
    errors: list[DeployError] = []

    def open_there() -> None:
        try:
            library.open_library()
        except DeployError as error:
            errors.append(error)

    thread = threading.Thread(target=open_there)
    thread.start()
    thread.join()
    assert "main thread" in errors[0].message
    assert not driver.stack


def test_a_machine_that_pycuda_cannot_use_is_one_clear_error(driver: Driver, at_exit: list[Any], library: Any) -> None:
    driver.fails = driver.Error("cuInit failed: no CUDA-capable device is detected")
    with pytest.raises(DeployError, match=r"engines cannot run here: .* no CUDA-capable device"):
        library.open_library()
    assert not at_exit
    driver.fails = None
    assert library.open_library().name == "pycuda"


@dataclass
class Given:
    """What the calls are made with."""

    stream: int
    event: object
    pointer: int


CALLS: dict[str, Callable[[Any, Given], object]] = {
    "allocate": lambda cuda, _: cuda.allocate(16),
    "free": lambda cuda, given: cuda.free(given.pointer),
    "allocate_pinned": lambda cuda, _: cuda.allocate_pinned(16),
    "create_stream": lambda cuda, _: cuda.create_stream(),
    "destroy_stream": lambda cuda, given: cuda.destroy_stream(given.stream),
    "copy_to_device": lambda cuda, given: cuda.copy_to_device(given.pointer, np.zeros(4), given.stream),
    "copy_to_host": lambda cuda, given: cuda.copy_to_host(np.zeros(4), given.pointer, given.stream),
    "synchronize": lambda cuda, given: cuda.synchronize(given.stream),
    "synchronize_device": lambda cuda, _: cuda.synchronize_device(),
    "create_event": lambda cuda, _: cuda.create_event(),
    "record": lambda cuda, given: cuda.record(given.event, given.stream),
    "synchronize_event": lambda cuda, given: cuda.synchronize_event(given.event),
    "elapsed_ms": lambda cuda, given: cuda.elapsed_ms(given.event, given.event),
}


@pytest.mark.parametrize("call", CALLS)
def test_each_call_reports_its_failure(call: str, driver: Driver, library: Any) -> None:
    cuda = library.open_library()
    given = Given(cuda.create_stream(), cuda.create_event(), cuda.allocate(16))
    driver.fails = driver.Error("an illegal memory access was encountered")
    with pytest.raises(DeployError, match="CUDA says an illegal memory access") as raised:
        CALLS[call](cuda, given)
    assert raised.value.hint
    driver.fails = None
    CALLS[call](cuda, Given(cuda.create_stream(), given.event, cuda.allocate(16)))


@pytest.mark.parametrize("call", ["allocate", "allocate_pinned"])
def test_missing_memory_is_told_as_such(call: str, driver: Driver, library: Any) -> None:
    cuda = library.open_library()
    driver.fails = driver.MemoryError("cuMemAlloc failed: out of memory")
    with pytest.raises(DeployError, match=r"16 bytes.* too little free memory"):
        getattr(cuda, call)(16)


def test_graphs_and_foreign_streams_are_refused(library: Any) -> None:
    cuda = library.open_library()
    with pytest.raises(DeployError, match="not support CUDA graphs"):
        cuda.begin_capture(cuda.create_stream())
    with pytest.raises(DeployError, match="did not make"):
        cuda.synchronize(123)
