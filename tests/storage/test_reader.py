"""The reader: what it brings equals the file, and every failure reaches whoever waits for the block."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashrt.errors import DiskError, PackError, UsageError
from flashrt.storage import direct
from flashrt.storage.cost import CostCurve
from flashrt.storage.layout import PAGE, Block
from flashrt.storage.pack import Pack
from flashrt.storage.reader import Reader
from flashrt_kernels.rows import Codec
from tests.conftest import MakePack
from tests.fake_source import MOE


@pytest.fixture
def pack(make_pack: MakePack) -> Pack:
    return Pack(make_pack(MOE, Codec.F32, block_bytes=1))


@pytest.fixture(params=["io_uring", "pread"])
def reader(pack: Pack, request: pytest.FixtureRequest) -> Iterator[Reader]:
    try:
        opened = Reader(pack, backend=request.param)
    except DiskError as error:
        pytest.skip(str(error))
    assert opened.backend == request.param
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


def set_cache(path: Path, warm: range) -> None:
    """Have the page cache hold these bytes of a file, and nothing else of it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        if warm:
            os.pread(handle, len(warm), warm.start)
    finally:
        os.close(handle)


def cached_pages(path: Path) -> int:
    """Pages of a file that the page cache holds."""
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as memory:
        there = (ctypes.c_ubyte * -(-size // PAGE))()
        address = ctypes.c_char.from_buffer(memory)
        try:
            assert ctypes.CDLL(None).mincore(ctypes.byref(address), ctypes.c_size_t(size), there) == 0
        finally:
            del address
        return sum(page & 1 for page in there)


@pytest.mark.parametrize("warm", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("backend", ["io_uring", "pread"])
def test_start_up_takes_what_the_page_cache_holds(make_pack: MakePack, backend: str, warm: float) -> None:
    """All, a part cut within blocks, or nothing: the bytes are the file's, and only the others come from the disk."""
    pack = Pack(make_pack(MOE, Codec.F32))
    for file, nbytes in pack.layout.file_bytes.items():
        set_cache(pack.path / file, range(int(warm * nbytes)))
    reader = Reader(pack, backend=backend)
    try:
        tickets = [reader.submit(block, aligned(block.nbytes), start=True) for block in blocks(pack)]
        for ticket in tickets:
            ticket.wait()
        everything = sum(block.nbytes for block in blocks(pack))
        assert reader.bytes_read == everything if warm == 0 else reader.bytes_read < everything
        assert warm < 1 or reader.bytes_read == 0
        if warm == 0:  # looking has brought nothing in
            assert not any(cached_pages(pack.path / file) for file in pack.layout.file_bytes)
        for ticket in tickets:
            assert ticket.buffer.tobytes() == on_disk(pack, ticket.block)
    finally:
        reader.close()


def test_only_start_up_looks_into_the_page_cache(make_pack: MakePack) -> None:
    pack = Pack(make_pack(MOE, Codec.F32))
    for file, nbytes in pack.layout.file_bytes.items():
        set_cache(pack.path / file, range(nbytes))
    reader = Reader(pack)
    try:
        block = blocks(pack)[0]
        reader.submit(block, aligned(block.nbytes)).wait()
        assert reader.bytes_read == block.nbytes
    finally:
        reader.close()


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


def rows(reader: Reader, file: str, offsets: list[int], nbytes: int) -> list[bytes]:
    out = np.zeros((len(offsets), nbytes + 3), np.uint8)[:, :nbytes]  # rows of some other array, and not aligned
    reader.submit_rows(file, np.array(offsets), out, np.arange(len(offsets))).wait()
    return [row.tobytes() for row in out]


@pytest.mark.parametrize("start", [0, 1, 63, 4095, 4096, 5000])
@pytest.mark.parametrize("nbytes", [1, 64, 4096, 4097])
def test_a_row_at_any_offset(pack: Pack, reader: Reader, start: int, nbytes: int) -> None:
    raw = (pack.path / "resident.safetensors").read_bytes()
    assert rows(reader, "resident.safetensors", [start], nbytes) == [raw[start : start + nbytes]]


def test_rows_at_the_end_of_a_file_that_ends_within_a_page(pack: Pack, reader: Reader) -> None:
    raw = (pack.path / "resident.safetensors").read_bytes()
    assert len(raw) % PAGE
    assert rows(reader, "resident.safetensors", [len(raw) - 9, len(raw) - 10], 9) == [raw[-9:], raw[-10:-1]]
    with pytest.raises(PackError, match=rf"resident\.safetensors ends before byte {len(raw) + 1}"):
        rows(reader, "resident.safetensors", [0, len(raw) - 8], 9)


def test_rows_go_to_their_slots_in_any_order_and_more_than_once(pack: Pack, reader: Reader) -> None:
    raw = (pack.path / "resident.safetensors").read_bytes()
    offsets = np.array([9000, 10, 9000, 5000])
    out = np.zeros((6, 100), np.uint8)
    ticket = reader.submit_rows("resident.safetensors", offsets, out, np.array([5, 0, 2, 3]))
    ticket.wait()
    for offset, slot in zip(offsets, [5, 0, 2, 3], strict=True):
        assert out[slot].tobytes() == raw[offset : offset + 100]
    assert not out[[1, 4]].any()


def test_no_rows_at_all(reader: Reader) -> None:
    assert rows(reader, "resident.safetensors", [], 9) == []


def test_rows_are_merged_by_what_reads_cost(pack: Pack) -> None:
    for curve, pages in ((CostCurve({4096: 1e8, 1 << 20: 1e9}), 3), (None, 2)):  # the gap of a page included, or not
        reader = Reader(pack, curve=curve)
        try:
            out = np.zeros((2, 9), np.uint8)
            ticket = reader.submit_rows("resident.safetensors", np.array([0, 9000]), out, np.arange(2))
            ticket.wait()
            assert ticket.bytes_read == reader.bytes_read == pages * PAGE
        finally:
            reader.close()


def test_a_damaged_block_is_named(pack: Pack, reader: Reader) -> None:
    block = blocks(pack)[3]
    with open(pack.path / block.file, "r+b") as handle:
        handle.seek(block.offset)
        byte = handle.read(1)[0]
        handle.seek(block.offset)
        handle.write(bytes([byte ^ 1]))
    with pytest.raises(PackError, match=rf"{block.file}.*block {block.index} of {block.tensor}"):
        reader.submit(block, aligned(block.nbytes)).wait()


@pytest.mark.parametrize("o_direct", [True, False])
@pytest.mark.parametrize("left", [0, 1, 1000, 4096, 5000])
def test_a_file_cut_short_while_in_use(pack: Pack, monkeypatch: pytest.MonkeyPatch, left: int, o_direct: bool) -> None:
    if not o_direct:
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


def test_an_io_error_reaches_whoever_waits(pack: Pack, reader: Reader) -> None:
    block = blocks(pack)[0]
    kept, there = os.dup(reader._files[block.file][0]), reader._files[block.file][0]
    folder = os.open(pack.path, os.O_RDONLY)
    os.dup2(folder, there)  # a directory can be opened, but not read
    ticket = reader.submit(block, aligned(block.nbytes))
    with pytest.raises(DiskError, match=rf"{block.file} at byte {block.offset} failed: Is a directory"):
        ticket.wait()
    os.dup2(kept, there)
    again = reader.submit(block, aligned(block.nbytes))  # the engine lives on
    again.wait()
    assert again.buffer.tobytes() == on_disk(pack, block)
    os.close(kept)
    os.close(folder)


def _without_o_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuses(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, *rest)

    monkeypatch.setattr(direct.os, "open", refuses)


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


def test_closing_finishes_or_cancels_what_is_under_way(pack: Pack, reader: Reader) -> None:
    tickets = [reader.submit(block, aligned(block.nbytes)) for block in blocks(pack)]
    reader.close()
    assert all(ticket.ready for ticket in tickets)
    for ticket in tickets:
        with contextlib.suppress(UsageError):
            ticket.wait()
            assert ticket.buffer.tobytes() == on_disk(pack, ticket.block)
    with pytest.raises(UsageError, match="the engine is closed"):
        reader.submit(blocks(pack)[0], aligned(PAGE))
    reader.close()


def test_cancelling(pack: Pack, reader: Reader) -> None:
    tickets = [reader.submit(block, aligned(block.nbytes)) for block in blocks(pack) * 20]
    for ticket in tickets[::2]:
        ticket.cancel()
    reader.settle()
    assert all(ticket.ready for ticket in tickets)
    for ticket in tickets[1::2]:
        ticket.wait()
        assert ticket.buffer.tobytes() == on_disk(pack, ticket.block)


def test_a_ticket_that_nobody_keeps(pack: Pack, reader: Reader) -> None:
    """Its memory must not be written to once it may belong to somebody else."""
    for _ in range(50):
        for block in blocks(pack):
            reader.submit(block, aligned(block.nbytes))
    reader.settle()


def test_waiting_can_be_interrupted(pack: Pack, reader: Reader, tmp_path: Path) -> None:
    """A FIFO stands for a disk that does not answer."""
    if reader.backend == "pread":
        pytest.skip("pread does not read from a FIFO")
    block = blocks(pack)[0]
    os.mkfifo(tmp_path / "fifo")
    fifo = os.open(tmp_path / "fifo", os.O_RDWR)
    kept, there = os.dup(reader._files[block.file][0]), reader._files[block.file][0]
    os.dup2(fifo, there)
    reader._files[block.file] = there, False
    ticket = reader.submit(block, aligned(block.nbytes))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            ticket.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
        os.write(fifo, bytes(block.nbytes))
        with pytest.raises(PackError, match="does not match its checksum"):
            ticket.wait()
        os.dup2(kept, there)
        os.close(kept)
        os.close(fifo)


def test_where_io_uring_is_forbidden(pack: Pack) -> None:
    """As in many containers: a seccomp filter answers EPERM."""
    done = subprocess.run([sys.executable, "-c", FORBIDDEN, str(pack.path)], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["pread", "the", "same"]


FORBIDDEN = """
import ctypes, mmap, struct, sys
import numpy as np
from flashrt.storage.pack import Pack
from flashrt.storage.reader import Reader

IO_URING_SETUP, EPERM = 425, 1
code = [(0x20, 0, 0, 0), (0x15, 0, 1, IO_URING_SETUP), (6, 0, 0, 0x00050000 | EPERM), (6, 0, 0, 0x7FFF0000)]
filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(code), ctypes.addressof(filters)))
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    print("no seccomp here")
    sys.exit(77)
pack = Pack(sys.argv[1])
reader = Reader(pack)
block = next(iter(pack.layout.tensors.values())).block(0)
buffer = np.frombuffer(mmap.mmap(-1, block.nbytes), np.uint8)
reader.submit(block, buffer).wait()
raw = (pack.path / block.file).read_bytes()[block.offset : block.offset + block.nbytes]
print(reader.backend, "the same" if buffer.tobytes() == raw else "other bytes")
reader.close()
"""
