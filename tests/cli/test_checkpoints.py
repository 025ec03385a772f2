"""Packing: on request, on first use, interrupted, side by side."""

from __future__ import annotations

import hashlib
import json
import re
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, Launch, check_failure
from tests.families import tiny_checkpoint
from tests.kept import CASES
from tests.quantized import FORMATS, quantized_checkpoint


def checksums(pack: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(pack.iterdir())}


def test_pack_prints_what_it_made(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    result = cli("pack", checkpoint, tmp_path / "out", "--dtype", "int4", "--json")
    facts = json.loads(result.stdout)
    assert facts["dtype"] == "int4"
    assert 4 < facts["bits_per_weight"] < 16  # tiny rows are mostly padding
    assert result.returncode == 0
    check_failure(cli("pack", checkpoint, tmp_path / "out", "--dtype", "int4"), 2, "already holds a finished pack")


def test_a_checkpoint_is_packed_once(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ("run", checkpoint, "--prompt", "hello", "-n", 4, "--cache-dir", tmp_path, "--dtype", "bf16")
    first = cli(*arguments)
    assert first.returncode == 0, first.stderr
    (packed,) = (path for path in (tmp_path / "packs").iterdir() if path.is_dir())
    assert packed.name.startswith("tiny-llama-bf16-")
    written = (packed / "manifest.json").stat().st_mtime_ns
    assert cli(*arguments).stdout == first.stdout
    assert (packed / "manifest.json").stat().st_mtime_ns == written
    facts = json.loads(cli("inspect", checkpoint, "--cache-dir", tmp_path, "--dtype", "bf16", "--json").stdout)
    assert facts["path"] == str(packed)


def test_two_runs_pack_a_checkpoint_once(launch: Launch, long_checkpoint: Path, tmp_path: Path) -> None:
    command = ("run", long_checkpoint, "-p", "a", "-n", 2, "--cache-dir", tmp_path, "--json")
    runs = [launch(*command) for _ in range(2)]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    first, second = (json.loads(out) for out, _ in outputs)
    assert first["token_ids"] == second["token_ids"]
    assert len([path for path in (tmp_path / "packs").iterdir() if path.is_dir()]) == 1


def test_packing_does_not_count_against_the_run(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    """The run that packs first is measured like the run that finds the pack."""
    arguments = ("plan", checkpoint, "--cache-dir", tmp_path, "--json")
    first, second = (json.loads(cli(*arguments).stdout) for _ in range(2))
    assert abs(first["smallest_budget_bytes"] - second["smallest_budget_bytes"]) < 8 << 20


def test_a_killed_pack_is_finished_with_the_same_bytes(
    cli: Cli, launch: Launch, long_checkpoint: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli("pack", long_checkpoint, whole).returncode == 0
    for wanted in (1, 7, 20, 35):
        process = launch("pack", long_checkpoint, broken)
        deadline = time.monotonic() + 60
        while len(list(broken.glob("*.entry.json"))) < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert not (broken / "manifest.json").exists()
        check_failure(cli("run", broken, "--prompt", "a"), 1, "not a finished pack")
    assert cli("pack", long_checkpoint, broken).returncode == 0
    assert checksums(broken) == checksums(whole)


def test_ctrl_c_while_packing_leaves_no_half_written_file(
    cli: Cli, launch: Launch, long_checkpoint: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    process = launch("run", long_checkpoint, "-p", "a", "--cache-dir", cache, text=True)
    while not list(cache.glob("packs/*/*.entry.json")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr == "error: interrupted\n"
    assert not list(cache.glob("packs/*/*.tmp"))
    assert cli("run", long_checkpoint, "-p", "a", "-n", 2, "--cache-dir", cache).returncode == 0


def test_a_full_disk_is_one_message_and_packing_goes_on(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    def limit() -> None:  # what a full disk does to a write, without filling one
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out = tmp_path / "out"
    check_failure(cli("pack", checkpoint, out, preexec_fn=limit), 1, "writing to", str(out))
    assert not list(out.glob("*.tmp"))
    check_failure(cli("verify", out), 1, "not a finished pack")
    assert cli("pack", checkpoint, out).returncode == 0
    assert cli("verify", out).returncode == 0


def test_a_small_disk_is_refused_up_front(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        check_failure(cli("pack", checkpoint, disk / "out"), 1, "free some space")
        check_failure(cli("doctor", "--dir", disk), 1, "free")
        check_failure(cli("run", checkpoint, "-p", "a", "--cache-dir", disk), 1, "free some space")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_cache_that_cannot_be_written_is_named(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_failure(cli("run", checkpoint, "-p", "a", "--cache-dir", tmp_path / "file" / "cache"), 1, "--cache-dir")


def test_delete_source_moves(cli: Cli, tmp_path: Path) -> None:
    source, out = tiny_checkpoint("qwen2", tmp_path / "source")[1], tmp_path / "out"
    done = cli("pack", source, out, "--dtype", "int4", "--delete-source", "--json")
    assert done.returncode == 0, done.stderr
    assert not list(source.glob("*.safetensors"))
    assert (source / "config.json").exists()
    assert cli("verify", out).returncode == 0
    again = cli("pack", source, out, "--delete-source")
    assert again.returncode == 1
    assert "holds no safetensors weights" in again.stderr
    refused = cli("pack", "demo", tmp_path / "other", "--delete-source")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--delete-source deletes a directory's or a file's weights" in refused.stderr


def test_a_quantized_file_is_packed_as_it_is(cli: Cli, tmp_path: Path) -> None:
    """By default; --dtype quantizes again. Both run, and say what they hold."""
    path = CASES["single"].write(tmp_path / "model.gguf")
    told = cli("pack", path, tmp_path / "kept").stdout
    assert "as q4_0/q4_1/q5_0/q5_1/q8_0, " in told
    assert "not kept, but quantized again to int8: k (F16, 1 of them), down (F16, 4 of them)" in told
    facts = json.loads(cli("pack", path, tmp_path / "int4", "--dtype", "int4", "--json").stdout)
    assert (facts["dtype"], facts["requantized"]) == ("int4", {})
    assert json.loads(cli("inspect", tmp_path / "kept", "--json").stdout)["dtype"] == "q4_0/q4_1/q5_0/q5_1/q8_0"
    for pack in ("kept", "int4"):
        found = cli("run", tmp_path / pack, "-p", "hello", "-n", 3, "--ignore-eos")
        assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("name", ["fp8", "gptq", "nvfp4"])
def test_quantized_checkpoints_of_hugging_face(cli: Cli, name: str, tmp_path: Path) -> None:
    own = FORMATS[name]
    path, _ = quantized_checkpoint(own, tmp_path, **own.extra)
    made = cli("pack", path, tmp_path / "p")
    assert made.returncode == 0, made.stderr
    label = {"fp8": "FP8 in blocks of 24x56, 3 of them", "gptq": "embed (F32, 1 of them)", "nvfp4": "NVFP4, 3 of them"}
    assert re.search(r"\nnot kept, but quantized again to int8: .*\n$", made.stdout), made.stdout
    assert label[name] in made.stdout
    assert f" as {'q4_0' if own.kept else 'int8'}, " in made.stdout
    result = cli("run", path, "--prompt", "hello", "--max-new-tokens", 5, "--ignore-eos")
    assert result.returncode == 0, result.stderr
    assert (
        result.stdout == cli("run", tmp_path / "p", "--prompt", "hello", "--max-new-tokens", 5, "--ignore-eos").stdout
    )
