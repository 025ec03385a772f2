"""The reader: what it brings equals the file, and every failure reaches whoever waits for the block."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashrt.errors import DiskError, PackError
from flashrt.storage import reader as reader_module
from flashrt.storage.layout import PAGE, Block
from flashrt.storage.pack import Pack
from flashrt.storage.reader import Reader
from flashrt_kernels.rows import Codec
from tests.conftest import MakePack
from tests.fake_source import MOE


@pytest.fixture
def pack(make_pack: MakePack) -> Pack:
    return Pack(make_pack(MOE, Codec.F32, block_bytes=1))


@pytest.fixture
def reader(pack: Pack) -> Iterator[Reader]:
    opened = Reader(pack)
    yield opened
    opened.close()


def aligned(nbytes: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)


def blocks(pack: Pack) -> list[Block]:
    return [t.block(i) for t in pack.layout.tensors.values() for i in range(t.blocks)]


def on_disk(pack: Pack, block: Block) -> bytes:
    return (pack.path / block.file).read_bytes()[block.offset : block.offset + block.nbytes]


def test_every_block_equals_the_file(pack: Pack, reader: Reader) -> None:
    wanted = blocks(pack)
    tickets = [reader.submit(block, aligned(block.nbytes)) for block in wanted]
    for ticket in reversed(tickets):
        ticket.wait()
        assert ticket.ready
        assert ticket.buffer.tobytes() == on_disk(pack, ticket.block)
    assert reader.bytes_read == sum(block.nbytes for block in wanted)


def test_many_threads_at_once(pack: Pack, reader: Reader) -> None:
    wanted, failures = blocks(pack), []

    def use(seed: int) -> None:
        for i in np.random.default_rng(seed).integers(0, len(wanted), 40):
            ticket = reader.submit(wanted[i], aligned(wanted[i].nbytes))
            ticket.wait()
            if ticket.buffer.tobytes() != on_disk(pack, wanted[i]):
                failures.append(i)

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("start", [0, 1, 63, 4095, 4096, 5000])
@pytest.mark.parametrize("nbytes", [1, 64, 4096, 4097])
def test_rows_at_any_offset(pack: Pack, reader: Reader, start: int, nbytes: int) -> None:
    raw = (pack.path / "resident.safetensors").read_bytes()
    window = aligned(-(-nbytes // PAGE) * PAGE + 2 * PAGE)
    assert reader.read_rows("resident.safetensors", start, nbytes, window).tobytes() == raw[start : start + nbytes]


def test_rows_at_the_end_of_a_file_that_ends_within_a_page(pack: Pack, reader: Reader) -> None:
    raw = (pack.path / "resident.safetensors").read_bytes()
    assert len(raw) % PAGE
    window = aligned(3 * PAGE)
    assert reader.read_rows("resident.safetensors", len(raw) - 9, 9, window).tobytes() == raw[-9:]


def test_a_damaged_block_is_named(pack: Pack, reader: Reader) -> None:
    block = blocks(pack)[3]
    with open(pack.path / block.file, "r+b") as handle:
        handle.seek(block.offset)
        byte = handle.read(1)[0]
        handle.seek(block.offset)
        handle.write(bytes([byte ^ 1]))
    with pytest.raises(PackError, match=rf"{block.file}.*block {block.index} of {block.tensor}"):
        reader.submit(block, aligned(block.nbytes)).wait()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("left", [0, 1, 1000, 4096, 5000])
def test_a_file_cut_short_while_in_use(pack: Pack, monkeypatch: pytest.MonkeyPatch, left: int, direct: bool) -> None:
    if not direct:
        _without_o_direct(monkeypatch)
    block = max(blocks(pack), key=lambda b: b.nbytes)
    assert block.nbytes > 5000
    opened = Reader(pack)
    try:
        os.truncate(pack.path / block.file, block.offset + left)
        ticket = opened.submit(block, aligned(block.nbytes))
        with pytest.raises(PackError, match=rf"{block.file} ends before byte"):
            ticket.wait()
    finally:
        opened.close()


def test_an_io_error_reaches_whoever_waits(pack: Pack, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    block = blocks(pack)[0]
    with monkeypatch.context() as patch:
        patch.setattr(reader_module.os, "preadv", fails)
        ticket = reader.submit(block, aligned(block.nbytes))
        with pytest.raises(DiskError, match=rf"{block.file} at byte {block.offset} failed: Input/output error"):
            ticket.wait()
    again = reader.submit(block, aligned(block.nbytes))  # the worker lives on
    again.wait()
    assert again.buffer.tobytes() == on_disk(pack, block)


def test_short_reads_are_continued(pack: Pack, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal may cut a read anywhere; O_DIRECT then goes on from a page boundary."""
    real = os.preadv

    def short(handle: int, buffers: list[memoryview], offset: int) -> int:
        assert offset % PAGE == 0
        return min(real(handle, buffers, offset), 5000)

    monkeypatch.setattr(reader_module.os, "preadv", short)
    block = max(blocks(pack), key=lambda b: b.nbytes)
    ticket = reader.submit(block, aligned(block.nbytes))
    ticket.wait()
    assert ticket.buffer.tobytes() == on_disk(pack, block)


def _without_o_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuses(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest)

    monkeypatch.setattr(reader_module.os, "open", refuses)


def test_a_file_system_without_o_direct(pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_o_direct(monkeypatch)
    opened = Reader(pack)
    try:
        assert not opened.direct
        for block in blocks(pack):
            ticket = opened.submit(block, aligned(block.nbytes))
            ticket.wait()
            assert ticket.buffer.tobytes() == on_disk(pack, block)
    finally:
        opened.close()


def test_a_file_that_cannot_be_opened(pack: Pack) -> None:
    (pack.path / "layer-001.safetensors").unlink()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DiskError, match=r"layer-001\.safetensors"):
        Reader(pack)
    assert len(os.listdir("/proc/self/fd")) == before


def test_closing_finishes_what_is_under_way(pack: Pack) -> None:
    opened = Reader(pack)
    tickets = [opened.submit(block, aligned(block.nbytes)) for block in blocks(pack)]
    opened.close()
    assert all(ticket.ready for ticket in tickets)
    assert all(ticket.error is None for ticket in tickets)
