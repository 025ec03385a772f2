"""Packing under bad luck: killed anywhere, resumed, a full disk, a damaged checkpoint. Nothing lost or half-written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashrt.errors import CheckpointError, DiskError, PackError, UnsupportedModelError, UsageError
from flashrt.storage import packer
from flashrt.storage.manifest import MANIFEST_FILE
from flashrt.storage.pack import Pack, is_pack
from flashrt.storage.packer import pack
from flashrt_kernels.rows import Codec
from tests.fake_source import DENSE, MOE, FakeSource, pattern


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it and go on."""


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    path = tmp_path_factory.mktemp("undisturbed") / "p"
    pack(FakeSource(MOE), path, Codec.INT4, block_bytes=1 << 13)
    return contents(path)


def _kill_at(monkeypatch: pytest.MonkeyPatch, countdown: int) -> list[int]:
    """Raise from the `countdown`-th system call that changes the disk on, so that nothing is cleaned up either."""
    left = [countdown]

    def counted(call):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return call(*args, **kwargs)

        return wrapper

    for name in ("fsync", "replace"):
        monkeypatch.setattr(packer.os, name, counted(getattr(os, name)))
    monkeypatch.setattr(packer.Path, "unlink", counted(Path.unlink))
    return left


def test_killed_at_every_point_then_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    point = 0
    while True:
        out = tmp_path / str(point)
        with monkeypatch.context() as patch:
            left = _kill_at(patch, point)
            with contextlib.suppress(Killed):
                pack(FakeSource(MOE), out, Codec.INT4, block_bytes=1 << 13)
            if left[0] >= 0:
                break
        finished = is_pack(out)
        if finished:
            Pack(out).verify()
        else:
            with pytest.raises(PackError, match="not a finished pack"):
                Pack(out)
        if not finished or (out / packer.JOB_FILE).exists():
            pack(FakeSource(MOE), out, Codec.INT4, block_bytes=1 << 13)
        assert contents(out) == undisturbed
        shutil.rmtree(out)
        point += 1
    assert point > 20


def test_what_was_finished_is_not_packed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "p"
    with monkeypatch.context() as patch:
        _kill_at(patch, 12)
        with pytest.raises(Killed):
            pack(FakeSource(MOE), out, Codec.F32)
    written = {p.name: p.stat().st_mtime_ns for p in out.iterdir() if p.suffix == ".safetensors"}
    assert written
    pack(FakeSource(MOE), out, Codec.F32)
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written


PROGRAM = """
import sys, time
from pathlib import Path
from flashrt.storage.packer import pack
from flashrt_kernels.rows import Codec
from tests.fake_source import MOE, FakeSource

class Slow(FakeSource):
    def vector(self, key):
        time.sleep(0.1)
        return super().vector(key)

print("ready", flush=True)
pack(Slow(MOE), Path(sys.argv[1]), Codec.INT4, block_bytes=1 << 13)
"""


def test_a_real_kill(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """SIGKILL at random moments until one run comes through."""
    out, luck, kills = tmp_path / "p", random.Random(0), 0
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    for _ in range(20):
        with subprocess.Popen([sys.executable, "-c", PROGRAM, str(out)], stdout=subprocess.PIPE, env=env) as child:
            assert child.stdout is not None
            child.stdout.readline()
            if kills < 4:
                time.sleep(luck.uniform(0.0, 0.15))
                child.send_signal(signal.SIGKILL)
            code = child.wait()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills == 4
    assert contents(out) == undisturbed


def test_resuming_with_another_dtype_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        _kill_at(patch, 12)
        with pytest.raises(Killed):
            pack(FakeSource(DENSE), tmp_path / "p", Codec.INT4)
    before = contents(tmp_path / "p")
    with pytest.raises(UsageError, match="another checkpoint or dtype"):
        pack(FakeSource(DENSE), tmp_path / "p", Codec.INT8)
    with pytest.raises(UsageError, match="another checkpoint or dtype"):
        pack(FakeSource(DENSE, fingerprint="g"), tmp_path / "p", Codec.INT4)
    assert contents(tmp_path / "p") == before


def test_a_finished_pack_and_strange_directories_are_left_alone(tmp_path: Path) -> None:
    pack(FakeSource(DENSE), tmp_path / "p", Codec.INT4)
    before = contents(tmp_path / "p")
    with pytest.raises(UsageError, match="already holds a finished pack"):
        pack(FakeSource(DENSE), tmp_path / "p", Codec.INT4)
    assert contents(tmp_path / "p") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        pack(FakeSource(DENSE), tmp_path / "mine", Codec.INT4)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match="file"):
        pack(FakeSource(DENSE), tmp_path / "file", Codec.INT4)


def test_two_packers_do_not_share_a_directory(tmp_path: Path) -> None:
    class Nosy(FakeSource):
        def text_files(self) -> dict[str, bytes]:
            with pytest.raises(UsageError, match="another process"):
                pack(FakeSource(DENSE), tmp_path / "p", Codec.F32)
            return super().text_files()

    pack(Nosy(DENSE), tmp_path / "p", Codec.F32)
    Pack(tmp_path / "p").verify()


@pytest.mark.parametrize("entry", ["", "[]", "{}", "null", '{"blocks_crc32": []}', "\0"])
def test_a_damaged_note_of_progress_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes], entry: str
) -> None:
    out = tmp_path / "p"
    with monkeypatch.context() as patch:
        _kill_at(patch, 12)
        with pytest.raises(Killed):
            pack(FakeSource(MOE), out, Codec.INT4, block_bytes=1 << 13)
    notes = list(out.glob("*.entry.json"))
    assert notes
    for note in notes:
        note.write_text(entry)
    pack(FakeSource(MOE), out, Codec.INT4, block_bytes=1 << 13)
    assert contents(out) == undisturbed


def test_a_file_lost_between_two_runs_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "p"
    with monkeypatch.context() as patch:
        _kill_at(patch, 12)
        with pytest.raises(Killed):
            pack(FakeSource(MOE), out, Codec.INT4, block_bytes=1 << 13)
    (out / "resident.safetensors").unlink()
    pack(FakeSource(MOE), out, Codec.INT4, block_bytes=1 << 13)
    assert contents(out) == undisturbed


def test_a_disk_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match=r"needs 0\.\d+ GB more .* has 0\.07 GB free"):
        pack(FakeSource(DENSE), tmp_path / "p", Codec.F32)
    monkeypatch.undo()
    assert (tmp_path / "p" / packer.JOB_FILE).read_text() == ""
    pack(FakeSource(DENSE), tmp_path / "p", Codec.INT4)  # a smaller dtype, as the message advises
    Pack(tmp_path / "p").verify()


def test_a_tokenizer_that_is_missing_is_noticed_first(tmp_path: Path) -> None:
    class Mute(FakeSource):
        def text_files(self) -> dict[str, bytes]:
            raise CheckpointError("no tokenizer.json")

    with pytest.raises(CheckpointError, match="no tokenizer"):
        pack(Mute(DENSE), tmp_path / "p", Codec.F32)
    assert [p.name for p in (tmp_path / "p").iterdir()] == [packer.JOB_FILE]
    pack(FakeSource(DENSE), tmp_path / "p", Codec.INT8)  # without weights the directory is bound to no dtype
    assert contents(tmp_path / "p") == _whole(tmp_path / "q", Codec.INT8)


def _whole(out: Path, codec: Codec) -> dict[str, bytes]:
    pack(FakeSource(DENSE), out, codec)
    return contents(out)


@pytest.mark.parametrize("method", ["vector", "matrix_rows", "neuron_rows", "text_files"])
def test_a_source_that_fails_is_not_taken_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(FakeSource, method, fails)
    with pytest.raises(CheckpointError, match="reading nowhere failed: Input/output error"):
        pack(FakeSource(DENSE), tmp_path / "p", Codec.F32)
    assert not list((tmp_path / "p").glob("*.tmp"))


def test_a_limit_on_file_size_is_one_error_and_can_be_resumed(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out, before = tmp_path / "p", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        with pytest.raises(DiskError, match="File too large"):
            pack(FakeSource(MOE), out, Codec.INT4, block_bytes=1 << 13)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not is_pack(out)
    assert not list(out.glob("*.tmp"))
    pack(FakeSource(MOE), out, Codec.INT4, block_bytes=1 << 13)
    assert contents(out) == undisturbed


@pytest.fixture
def tiny_disk(tmp_path: Path):
    """A file system of 128 KiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(mount)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_disk_that_fills_up(tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roomy = shutil.disk_usage("/")._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: roomy)
    with pytest.raises(DiskError, match="is full"):
        pack(FakeSource(DENSE), tiny_disk / "p", Codec.F32)
    assert not list((tiny_disk / "p").glob("*.tmp"))
    assert not is_pack(tiny_disk / "p")


def test_a_failing_disk_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(packer.os, "fsync", fails)
    with pytest.raises(DiskError, match=str(tmp_path / "p")):
        pack(FakeSource(DENSE), tmp_path / "p", Codec.F32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key", ["embed", "1.norm.ffn", "0.0.down"])
def test_weights_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, value: float) -> None:
    def damaged(name: str, rows: int, columns: int, first: int = 0) -> np.ndarray:
        data = pattern(name, rows, columns, first)
        if name == key:
            data[-1, -1] = value
        return data

    monkeypatch.setattr("tests.fake_source.pattern", damaged)
    with pytest.raises(CheckpointError, match=rf"{key.split('.')[0]}\S* holds values that are not finite"):
        pack(FakeSource(DENSE), tmp_path / "p", Codec.INT8)
    assert not is_pack(tmp_path / "p")


def test_shapes_that_kernels_do_not_take_are_refused_before_packing(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="nowhere is not supported: a table of 40 positions"):
        pack(FakeSource(replace(DENSE, positions=40)), tmp_path / "p", Codec.INT8)
    assert not (tmp_path / "p").exists()


def test_a_source_with_wrong_shapes(tmp_path: Path) -> None:
    class Wrong(FakeSource):
        def matrix_rows(self, key: str, start: int, stop: int) -> np.ndarray:
            return super().matrix_rows(key, start, stop)[:, :-1]

    with pytest.raises(CheckpointError, match="embed: read shape"):
        pack(Wrong(DENSE), tmp_path / "p", Codec.INT8)


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    manifest = pack(
        FakeSource(DENSE), tmp_path / "p", Codec.BF16, progress=lambda file, done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert seen[-1] == (manifest.layout.nbytes,) * 2


def test_the_job_file_is_gone_and_the_manifest_says_where_it_came_from(tmp_path: Path) -> None:
    pack(FakeSource(DENSE, name="n", source="s", fingerprint="q"), tmp_path / "p", Codec.INT4)
    body = json.loads((tmp_path / "p" / MANIFEST_FILE).read_bytes())
    assert (body["name"], body["source"], body["fingerprint"], body["dtype"]) == ("n", "s", "q", "int4")
    assert not (tmp_path / "p" / packer.JOB_FILE).exists()
