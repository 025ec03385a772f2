"""Packing that deletes its source: killed anywhere, nothing is lost, and the pack is the one that copying makes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flashrt.checkpoints.pack_job import move_checkpoint, pack_checkpoint
from flashrt.errors import CheckpointError, DiskError, UsageError
from flashrt.storage import packer
from flashrt.storage.layout import RESIDENT_FILE, layer_file
from flashrt.storage.moving import Move
from flashrt.storage.pack import Pack, is_pack
from flashrt.storage.sources import open_checkpoint
from flashrt.storage.sources.moved import RECORD, reopen, save
from tests.families import FAMILIES, tiny_checkpoint, tiny_gguf, tiny_model, write_tokenizer

from .test_packer import Killed, _kill_at

Files = dict[str, bytes]


def nothing(stage: str, done: int, total: int) -> None:
    pass


def contents(path: Path) -> Files:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def move(source: Path, out: Path) -> None:
    move_checkpoint(source, out, "int4", nothing)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files, some of which several layers share."""
    path = tmp_path_factory.mktemp("sharded") / "model"
    tiny_model("llama", num_hidden_layers=9).save_pretrained(path, max_shard_size="150KB")
    write_tokenizer(path)
    assert len(list(path.glob("*.safetensors"))) > 4
    return path


@pytest.fixture(scope="module")
def copied(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    out = tmp_path_factory.mktemp("copied") / "pack"
    pack_checkpoint(sharded, out, "int4", out.parent, nothing)
    return contents(out)


@pytest.fixture
def source(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "source"))


def same_pack(found: Files, expected: Files) -> bool:
    """But for where the pack came from, which a manifest states with its checksum."""
    states = [json.loads(files["manifest.json"]) for files in (found, expected)]
    for state in states:
        for key in ("source", "fingerprint", "checksum", "name"):
            del state[key]
    return states[0] == states[1] and all(found[k] == v for k, v in expected.items() if k != "manifest.json")


def users_of(checkpoint: Path) -> dict[Path, set[str]]:
    with open_checkpoint(checkpoint) as opened:
        users: dict[Path, set[str]] = {}
        for layer in (None, *range(len(opened.spec.layers))):
            for path in opened.files_behind(layer):
                users.setdefault(path, set()).add(RESIDENT_FILE if layer is None else layer_file(layer))
        return users


def check_nothing_is_lost(users: dict[Path, set[str]], out: Path) -> int:
    """What was packed from each file that is gone lies in finished files; how many are gone."""
    gone = [path for path in users if not path.exists()]
    for path in gone:
        for file in users[path]:
            assert (out / file).exists(), (path, file)
            if not is_pack(out):
                entry = json.loads((out / f"{file}{packer.ENTRY_SUFFIX}").read_bytes())
                assert entry["bytes"] == (out / file).stat().st_size
    return len(gone)


def test_the_weights_are_gone_and_all_else_is_there(source: Path, tmp_path: Path, copied: Files) -> None:
    others = {p.name for p in source.iterdir() if p.suffix != ".safetensors"}
    move(source, tmp_path / "out")
    assert {p.name for p in source.iterdir()} == others
    assert same_pack(contents(tmp_path / "out"), copied)
    Pack(tmp_path / "out").verify()


def test_killed_at_every_point_then_finished(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: Files
) -> None:
    point, gone = 0, set()
    while True:
        source, out = Path(shutil.copytree(sharded, tmp_path / f"source{point}")), tmp_path / f"out{point}"
        users = users_of(source)
        with monkeypatch.context() as patch:
            left = _kill_at(patch, point)
            with contextlib.suppress(Killed):
                move(source, out)
            if left[0] >= 0:
                break
        gone.add(check_nothing_is_lost(users, out))
        if not is_pack(out) or (out / RECORD).exists() or (out / packer.JOB_FILE).exists():
            move(source, out)
        assert same_pack(contents(out), copied)
        assert not list(source.glob("*.safetensors"))
        shutil.rmtree(source)
        shutil.rmtree(out)
        point += 15
    assert len(gone) > 3


PROGRAM = """
import sys
from pathlib import Path
from flashrt.checkpoints.pack_job import move_checkpoint

def step(*_):
    print("step", flush=True)
    sys.stdin.readline()

move_checkpoint(sys.argv[1], Path(sys.argv[2]), "int4", step)
"""


def test_ten_real_kills(source: Path, tmp_path: Path, copied: Files) -> None:
    """SIGKILL soon after random numbers of pieces, until one run comes through."""
    out, luck, users, gone = tmp_path / "out", random.Random(1), users_of(source), set()
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    for kills in range(11):
        command = [sys.executable, "-c", PROGRAM, str(source), str(out)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            for _ in range(luck.randint(1, 12) if kills < 10 else 0):
                child.stdout.readline()
                child.stdin.write(b"\n")
                child.stdin.flush()
            if kills < 10:
                time.sleep(luck.uniform(0.0, 0.02))
                child.send_signal(signal.SIGKILL)
            child.stdin.close()
            code = child.wait()
        gone.add(check_nothing_is_lost(users, out))
        assert code == (-signal.SIGKILL if kills < 10 else 0)
    assert len(gone) > 2
    assert same_pack(contents(out), copied)
    assert not list(source.glob("*.safetensors"))


@pytest.mark.parametrize("killed", [2, 30, 60])
def test_one_file_goes_at_the_end(killed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_gguf("qwen2", tmp_path / "tiny.gguf")[1]
    pack_checkpoint(path, tmp_path / "copied", "int4", tmp_path, nothing)
    with monkeypatch.context() as patch:
        _kill_at(patch, killed)
        with contextlib.suppress(Killed):
            move(path, tmp_path / "out")
    assert path.exists() or is_pack(tmp_path / "out")
    if path.exists() or (tmp_path / "out" / RECORD).exists():
        move(path, tmp_path / "out")
    assert not path.exists()
    assert same_pack(contents(tmp_path / "out"), contents(tmp_path / "copied"))


def interrupted(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Move until files are gone; those that are left."""
    for point in range(20, 200, 5):
        with monkeypatch.context() as patch:
            _kill_at(patch, point)
            with contextlib.suppress(Killed):
                move(source, out)
        left = sorted(source.glob("*.safetensors"))
        if (out / RECORD).exists() and left:
            return left
    raise AssertionError("nothing was deleted before the end")


def test_going_on_without_deleting(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: Files
) -> None:
    left = interrupted(source, tmp_path / "out", monkeypatch)
    pack_checkpoint(source, tmp_path / "out", "int4", tmp_path, nothing)
    assert same_pack(contents(tmp_path / "out"), copied)
    assert sorted(source.glob("*.safetensors")) == left


def test_another_checkpoint_and_changed_files_are_refused(
    source: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = interrupted(source, tmp_path / "out", monkeypatch)
    with pytest.raises(UsageError, match="is being moved: name that checkpoint"):
        move(sharded, tmp_path / "out")
    left[-1].write_bytes(left[-1].read_bytes() + b" ")
    with pytest.raises(CheckpointError, match="has changed since"):
        move(source, tmp_path / "out")


def test_what_nobody_names_is_refused(source: Path, sharded: Path, tmp_path: Path) -> None:
    for name in ("demo", "org/name"):
        with pytest.raises(UsageError, match=f"{name} is neither"):
            move_checkpoint(name, tmp_path / "out", "int4", nothing)
    first = sorted(source.glob("*.safetensors"))[0]
    first.unlink()
    first.symlink_to(sharded / first.name)
    with pytest.raises(UsageError, match="is a link"):
        move(source, tmp_path / "out")
    assert (sharded / first.name).exists()


def test_the_room_that_moving_needs(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less than the pack takes: the most that is written, less what was deleted before."""
    (tmp_path / "out").mkdir()
    users = users_of(source)
    with open_checkpoint(source) as opened:
        for dtype in (packer.Codec.F32, packer.Codec.INT4):
            layout = packer.pack_layout(opened.spec, dtype)
            moving, files = Move(opened, source, tmp_path / "out"), list(layout.file_bytes)
            most = moving.most(layout.file_bytes, ())
            taken = []
            for n in range(len(files)):
                free = (path.stat().st_size for path, needed in users.items() if needed <= set(files[:n]))
                taken.append(sum(layout.file_bytes[file] for file in files[: n + 1]) - sum(free))
            assert most == max(taken) < layout.nbytes
            assert moving.most(layout.file_bytes, files) == 0
    usage = shutil.disk_usage(tmp_path)._replace(free=most + (64 << 20) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match="GB free"):
        move(source, tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=most + (64 << 20)))
    move(source, tmp_path / "out")
    assert is_pack(tmp_path / "out")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_that_is_opened_again_reads_the_same(family, tmp_path):
    path = tiny_checkpoint(family, tmp_path / "model")[1]
    (tmp_path / "out").mkdir()
    with open_checkpoint(path) as opened:
        save(opened, path, tmp_path / "out")
        again = reopen(tmp_path / "out", path)
        assert again is not None
        assert dict(again.all_parts()) == dict(opened.all_parts())
        assert again.spec == opened.spec


@pytest.mark.parametrize("record", ["{}", "[]", "3", "nothing", '{"where": 3, "files": []}'])
def test_a_damaged_record_is_named(record, tmp_path):
    (tmp_path / RECORD).write_text(record.replace("3", json.dumps(str(tmp_path.resolve()))))
    with pytest.raises(CheckpointError, match="is damaged, and nothing else says what was moved"):
        reopen(tmp_path, tmp_path)
