"""Reads at start-up that a pass does not wait for as a whole."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import pytest

from flashrt.cache import loading as module
from flashrt.cache.loading import Loading
from flashrt.errors import DiskError


class SlowDevice:
    """Brings a block whenever the test says so; fails at block `bad`."""

    def __init__(self, bad: int = -1) -> None:
        self.bad, self.go, self.begun = bad, threading.Semaphore(0), 0

    def fill(self, items: Iterable[Any], arrived: Any) -> None:
        for i, _ in enumerate(items):
            self.begun += 1
            self.go.acquire()
            if i == self.bad:
                raise DiskError("the disk is gone")
            arrived(10)


@pytest.fixture(autouse=True)
def announced_singly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER", 1)


def loading(device: SlowDevice, seen: list[int]) -> Loading:
    items: list[Any] = [(None, None)] * 5
    return Loading(device, items, {"a": 2, "b": 5, "none": 0}, seen.append)  # type: ignore[arg-type]


def waits(load: Loading, name: str) -> bool:
    waiter = threading.Thread(target=load.wait, args=(name,), daemon=True)
    waiter.start()
    waiter.join(0.05)
    return waiter.is_alive()


def test_a_tensor_is_waited_for_and_no_other() -> None:
    device, seen = SlowDevice(), []
    load = loading(device, seen)
    load.wait("none")
    assert waits(load, "a")
    device.go.release(2)
    load.wait("a")
    assert waits(load, "b")
    device.go.release(3)
    load.wait("b")
    load.finish()
    assert seen == [10] * 5


def test_blocks_are_announced_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time here; the last one alone where nothing comes behind it."""
    monkeypatch.setattr(module, "TOGETHER", 2)
    device = SlowDevice()
    load = loading(device, [])
    device.go.release(1)
    assert waits(load, "a")
    device.go.release(1)
    load.wait("a")
    device.go.release(3)
    load.wait("b")


def test_a_failure_reaches_whoever_waits() -> None:
    device = SlowDevice(bad=3)
    load = loading(device, [])
    device.go.release(5)
    load.wait("a")
    for _ in range(2):
        with pytest.raises(DiskError, match="the disk is gone"):
            load.wait("b")
    with pytest.raises(DiskError, match="the disk is gone"):
        load.finish()
    load.wait("a")


def test_stopping_begins_no_more_reads() -> None:
    device = SlowDevice()
    load = loading(device, [])
    stopper = threading.Thread(target=load.stop)
    stopper.start()
    while not load._stopped:
        pass
    device.go.release(5)
    stopper.join()
    assert device.begun == 1
