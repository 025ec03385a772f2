"""The cache of cells against a dictionary, under random traces."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from flashrt.errors import DiskError
from flashrt.kv.cell_cache import CellCache

LAYERS, CELLS = 3, 40


class Disk:
    """Cells of one number each, which arrive when they are waited for."""

    def __init__(self, slots: int) -> None:
        self.content = np.arange(LAYERS * CELLS).reshape(LAYERS, CELLS) * 7
        self.memory = np.full(slots, -1)
        self.reads, self.fails = 0, False

    def __call__(self, layer: int, cells: np.ndarray, slots: np.ndarray) -> Disk._Reading:
        assert len(set(slots.tolist())) == len(slots)
        self.reads += len(cells)
        self.memory[slots] = -2  # what is there while it is being read
        return Disk._Reading(self, layer, cells.copy(), slots.copy())

    class _Reading:
        def __init__(self, disk: Disk, layer: int, cells: np.ndarray, slots: np.ndarray) -> None:
            self.disk, self.layer, self.cells, self.slots = disk, layer, cells, slots

        def wait(self) -> None:
            if self.disk.fails:
                self.disk.fails = False
                raise DiskError("a read failed")
            self.disk.memory[self.slots] = self.disk.content[self.layer, self.cells]


@pytest.mark.parametrize("slots", [12, 50, LAYERS * CELLS])
def test_what_is_fetched_is_there(slots):
    disk = Disk(slots)
    cache, random = CellCache(slots, LAYERS, CELLS, disk), np.random.default_rng(slots)
    wanted = 0
    for _ in range(500):
        layer, step = int(random.integers(LAYERS)), int(random.integers(8))
        cells = random.choice(CELLS, int(random.integers(1, min(slots, CELLS) + 1)), replace=False)
        if step == 0:
            cache.prefetch(layer, cells)
        elif step == 1:
            cache.drop(layer, cells)
            disk.content[layer, cells] += 1
        elif step == 2:
            cache.cancel()
        elif step == 3:
            disk.fails = True
            with contextlib.suppress(DiskError):
                cache.fetch(layer, cells)
            disk.fails = False
        else:
            wanted += len(cells)
            before = cache.counts["hits"] + cache.counts["misses"]
            parts = np.array_split(cells, int(random.integers(1, 4)))
            for part, held in zip(parts, cache.fetch_parts(layer, parts), strict=True):
                assert np.array_equal(disk.memory[held], disk.content[layer, part])
            assert cache.counts["hits"] + cache.counts["misses"] == before + len(cells)
    if slots == LAYERS * CELLS:
        assert cache.counts["hits"] > cache.counts["misses"]


def test_what_is_wanted_often_stays():
    """Two cells of every token stay, though what each token takes in turn is more than there are slots."""
    cache = CellCache(20, LAYERS, CELLS, Disk(20))
    random = np.random.default_rng(3)
    for token in range(60):
        if token == 20:
            cache.counts.clear()
        for layer in range(LAYERS):
            cache.fetch(layer, np.array([0, 1, *random.choice(np.arange(2, CELLS), 6, replace=False)]))
    assert cache.counts["hits"] > 0.9 * 40 * LAYERS * 2


def test_what_was_read_ahead_is_counted():
    cache = CellCache(20, LAYERS, CELLS, Disk(20))
    cache.prefetch(1, np.arange(4))
    cache.fetch(1, np.arange(2, 6))
    assert cache.counts == {"ahead": 4, "useful": 2, "hits": 2, "misses": 2}


def test_the_next_part_is_being_read_while_one_is_used():
    disk = Disk(20)
    cache = CellCache(20, LAYERS, CELLS, disk)
    parts = cache.fetch_parts(0, [np.arange(4), np.arange(4, 9)])
    first = next(parts)
    assert disk.reads == 9
    assert np.array_equal(disk.memory[first], disk.content[0, :4])
    assert (disk.memory == -2).sum() == 5  # not waited for yet
    assert np.array_equal(disk.memory[next(parts)], disk.content[0, 4:9])


def test_more_than_there_are_slots_is_an_error():
    with pytest.raises(ValueError, match="a cache of 12 cells"):
        CellCache(12, LAYERS, CELLS, Disk(12)).fetch(0, np.arange(13))
