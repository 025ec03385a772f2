"""The cache of blocks against a dictionary, under random traces."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from flashrt.errors import DiskError
from flashrt.kv.block_cache import BlockCache

LAYERS, BLOCKS = 3, 40


class Disk:
    """Blocks of one number each, which arrive when they are waited for."""

    def __init__(self, slots: int) -> None:
        self.content = np.arange(LAYERS * BLOCKS).reshape(LAYERS, BLOCKS) * 7
        self.memory = np.full(slots, -1)
        self.reads, self.fails = 0, False

    def __call__(self, layer: int, blocks: np.ndarray, slots: np.ndarray) -> Disk._Reading:
        assert len(set(slots.tolist())) == len(slots)
        self.reads += len(blocks)
        self.memory[slots] = -2  # what is there while it is being read
        return Disk._Reading(self, layer, blocks.copy(), slots.copy())

    class _Reading:
        def __init__(self, disk: Disk, layer: int, blocks: np.ndarray, slots: np.ndarray) -> None:
            self.disk, self.layer, self.blocks, self.slots = disk, layer, blocks, slots

        def wait(self) -> None:
            if self.disk.fails:
                self.disk.fails = False
                raise DiskError("a read failed")
            self.disk.memory[self.slots] = self.disk.content[self.layer, self.blocks]


@pytest.mark.parametrize("slots", [12, 50, LAYERS * BLOCKS])
def test_what_is_fetched_is_there(slots):
    disk = Disk(slots)
    cache, random = BlockCache(slots, LAYERS, BLOCKS, disk), np.random.default_rng(slots)
    wanted = 0
    for _ in range(500):
        layer, step = int(random.integers(LAYERS)), int(random.integers(8))
        blocks = random.choice(BLOCKS, int(random.integers(1, min(slots, BLOCKS) + 1)), replace=False)
        if step == 0:
            cache.prefetch(layer, blocks)
        elif step == 1:
            cache.drop(layer, blocks)
            disk.content[layer, blocks] += 1
        elif step == 2:
            cache.cancel()
        elif step == 3:
            disk.fails = True
            with contextlib.suppress(DiskError):
                cache.fetch(layer, blocks)
            disk.fails = False
        else:
            wanted += len(blocks)
            before = cache.counts["hits"] + cache.counts["misses"]
            assert np.array_equal(disk.memory[cache.fetch(layer, blocks)], disk.content[layer, blocks])
            assert cache.counts["hits"] + cache.counts["misses"] == before + len(blocks)
    if slots == LAYERS * BLOCKS:
        assert cache.counts["hits"] > cache.counts["misses"]


def test_what_is_wanted_often_stays():
    """Two blocks of every token stay, though what each token takes in turn is more than there are slots."""
    cache = BlockCache(20, LAYERS, BLOCKS, Disk(20))
    random = np.random.default_rng(3)
    for token in range(60):
        if token == 20:
            cache.counts.clear()
        for layer in range(LAYERS):
            cache.fetch(layer, np.array([0, 1, *random.choice(np.arange(2, BLOCKS), 6, replace=False)]))
    assert cache.counts["hits"] > 0.9 * 40 * LAYERS * 2


def test_what_was_read_ahead_is_counted():
    cache = BlockCache(20, LAYERS, BLOCKS, Disk(20))
    cache.prefetch(1, np.arange(4))
    cache.fetch(1, np.arange(2, 6))
    assert cache.counts == {"ahead": 4, "useful": 2, "hits": 2, "misses": 2}


def test_more_than_there_are_slots_is_an_error():
    with pytest.raises(ValueError, match="a cache of 12 blocks"):
        BlockCache(12, LAYERS, BLOCKS, Disk(12)).fetch(0, np.arange(13))
