"""Reads at start-up that go on while the first pass computes with what has arrived."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from flashrt.cache.device import Progress, Tensor
from flashrt.storage.layout import Block

TOGETHER = 16  # blocks that are announced at once

Item = tuple[Block, Tensor]  # a block and its place


class Filler(Protocol):
    """Who brings blocks to their places: a device, or `flashrt.cache.from_file`."""

    def fill(self, items: Iterable[Item], arrived: Progress) -> None: ...


class Loading:
    """A thread has `filler` bring the blocks of `items` to their places, in order.

    `needed` says for each tensor how many blocks have arrived when all of its own have. `arrived` is told of each.
    """

    def __init__(self, filler: Filler, items: Iterable[Item], needed: Mapping[str, int], arrived: Progress) -> None:
        self._filler, self._items, self._needed, self._arrived = filler, items, needed, arrived
        self._count = 0
        self._last = max(needed.values(), default=0)
        self._over = self._stopped = False
        self._failure: BaseException | None = None
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="flashrt-load", daemon=True)
        self._thread.start()

    def wait(self, name: str) -> None:
        """Return when a tensor is there. Raises what reading failed with.

        Whoever has to wait waits for a few blocks: waking takes long where others use the machine, too.
        """
        needed = self._needed[name]
        if self._count >= needed:
            return
        goal = min(-(-needed // TOGETHER) * TOGETHER, self._last)
        with self._news:
            self._news.wait_for(lambda: self._count >= goal or self._over)
        if self._count < needed and self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Return when everything is there. Raises what reading failed with."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Begin no more reads, and return when those that were begun are over."""
        self._stopped = True
        self._thread.join()

    def _run(self) -> None:
        try:
            self._filler.fill(self._until_stopped(), self._one_more)
        except BaseException as error:
            self._failure = error
        with self._news:
            self._over = True
            self._news.notify_all()

    def _until_stopped(self) -> Iterator[Item]:
        for item in self._items:
            if self._stopped:
                return
            yield item

    def _one_more(self, nbytes: int) -> None:
        self._count += 1
        if self._count % TOGETHER == 0 or self._count == self._last:
            with self._news:
                self._news.notify_all()
        self._arrived(nbytes)
