"""The I/O engine against a file's bytes, at any offset, size and destination, with both backends."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashrt.storage import _io
from flashrt.storage.direct import open_direct
from flashrt.storage.layout import PAGE

SIZE = (1 << 20) + 777
STAGING = 1 << 18


def aligned(nbytes: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


class Opened:
    def __init__(self, path: Path, backend: str) -> None:
        self.content = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
        path.write_bytes(self.content.tobytes())
        self.handle, self.direct = open_direct(path)
        self.engine = _io.Engine(backend, 4, 4 * PAGE, aligned(STAGING))

    def close(self) -> None:
        self.engine.close()
        os.close(self.handle)


@pytest.fixture(scope="module", params=["io_uring", "pread"])
def opened(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Opened]:
    try:
        result = Opened(tmp_path_factory.mktemp("engine") / "data", request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield result
    result.close()


many = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.integers(0, SIZE - 1), st.integers(1, 300_000), st.integers(0, 2 * PAGE))
@many
def test_a_read_at_any_place_of_any_length_to_any_memory(opened: Opened, offset: int, nbytes: int, place: int) -> None:
    nbytes = min(nbytes, SIZE - offset)
    memory = aligned(nbytes + 3 * PAGE)
    read = opened.engine.read(opened.handle, opened.direct, offset, memory[place : place + nbytes])
    assert read.wait() == 0
    assert read.ready
    assert (memory[place : place + nbytes] == opened.content[offset : offset + nbytes]).all()
    assert not memory[:place].any()
    assert not memory[place + nbytes :].any()


@given(
    st.lists(st.integers(0, SIZE - 1), max_size=60),
    st.integers(1, 20_000),
    st.sampled_from([0.0, 1.0, 8.0, 100.0, None]),
    st.randoms(use_true_random=False),
)
@many
def test_every_row_arrives_however_they_are_merged(opened, starts, row_bytes, fixed, choice) -> None:  # type: ignore
    starts = [min(start, SIZE - row_bytes) for start in starts]
    opened.engine.set_costs([] if fixed is None else [fixed + n for n in range(1, 9)])
    slots = list(range(len(starts) + 2))
    choice.shuffle(slots)
    out = np.zeros((len(slots), row_bytes), np.uint8)
    read = opened.engine.read_rows(
        opened.handle, opened.direct, np.array(starts, np.int64), out, np.array(slots[: len(starts)], np.int64)
    )
    assert read.wait() == 0
    for start, slot in zip(starts, slots, strict=False):
        assert (out[slot] == opened.content[start : start + row_bytes]).all()
    assert not out[slots[len(starts) :]].any()


def test_what_cannot_be(opened: Opened) -> None:
    out, one = np.zeros((2, 10), np.uint8), np.zeros(1, np.int64)
    arguments = opened.handle, opened.direct
    with pytest.raises(IndexError, match="no such slot"):
        opened.engine.read_rows(*arguments, one, out, one + 2)
    with pytest.raises(IndexError, match="negative"):
        opened.engine.read_rows(*arguments, one - 1, out, one)
    with pytest.raises(ValueError, match="one slot for each offset"):
        opened.engine.read_rows(*arguments, one, out, np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="contiguous"):
        opened.engine.read_rows(*arguments, one, np.zeros((10, 2), np.uint8).T, one)
    with pytest.raises(RuntimeError):
        opened.engine.read(*arguments, 0, np.zeros((10, 2), np.uint8))
    with pytest.raises(RuntimeError, match="no backend aio"):
        _io.Engine("aio", 4, PAGE, aligned(STAGING))
    with pytest.raises(ValueError, match="too small"):
        _io.Engine("", 4, PAGE, aligned(PAGE))


def test_a_long_row_twice(opened: Opened) -> None:
    opened.engine.set_costs([1.0] * 8)
    out = aligned(4 * STAGING).reshape(2, -1)
    read = opened.engine.read_rows(opened.handle, opened.direct, np.array([PAGE, PAGE]), out, np.arange(2))
    assert read.wait() == 0
    assert (out == opened.content[PAGE : PAGE + 2 * STAGING]).all()


def test_a_read_beyond_the_end(opened: Opened) -> None:
    read = opened.engine.read(opened.handle, opened.direct, SIZE - 5, aligned(6))
    assert read.wait() == _io.ENDED
    assert read.at == SIZE + 1
