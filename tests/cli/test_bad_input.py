"""Every kind of bad input ends in one message and a status, before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flashrt
from flashrt.checkpoints.resolve import resolve
from flashrt.cli.guard import guarded
from flashrt.errors import CheckpointError, UsageError
from flashrt.storage.manifest import _checksum
from tests.cli.conftest import COMMAND, Cli, check_failure, set_text


@pytest.fixture
def copy(pack: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pack, tmp_path / "copy"))


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf", "1e300"])
def test_a_budget_that_is_none(cli: Cli, pack: Path, budget: str) -> None:
    check_failure(cli("run", pack, "--prompt", "a", f"--budget-gb={budget}"), 2, "budget", "above 0")


@pytest.mark.parametrize("command", [("run", "--prompt", "a"), ("plan",), ("bench",), ("chat",)])
def test_a_budget_of_a_few_megabytes(cli: Cli, pack: Path, command: tuple[str, ...]) -> None:
    name, *rest = command
    check_failure(cli(name, pack, *rest, "--budget-gb", "0.005"), 1, "too small", "the smallest that would do")


def test_contexts_and_prompts_that_do_not_fit(cli: Cli, pack: Path) -> None:
    run = ("run", pack, "--prompt")
    check_failure(cli(*run, "a", "--context", 257), 2, "at most 256")
    check_failure(cli("plan", pack, "--context", 257), 2, "at most 256")
    check_failure(cli("chat", pack, "--context", 257), 2, "at most 256")
    check_failure(cli("bench", pack, "--prompt-tokens", 300), 2, "context of 256")
    check_failure(cli(*run, "words and " * 60), 2, "prompt", "256")
    check_failure(cli(*run, "words and words", "--context", 3), 2, "--context 3")
    check_failure(cli(*run, "words", "--max-new-tokens", 256), 2, "lower --max-new-tokens to")


def test_prompts_that_are_none(cli: Cli, pack: Path, tmp_path: Path) -> None:
    check_failure(cli("run", pack, "--prompt", ""), 2, "the prompt is empty")
    check_failure(cli("run", pack), 2, "the prompt is empty")
    check_failure(cli("run", pack, stdin=b"caf\xe9"), 2, "UTF-8", "byte 3")
    check_failure(cli("run", pack, "--prompt-file", tmp_path / "none"), 2, "No such file")
    check_failure(cli("run", pack, "--prompt", "a", "--prompt-file", "-"), 2, "contradict")
    check_failure(cli("run", pack, "--prompt", "a", "--raw", "--system", "b"), 2, "--raw contradict")
    check_failure(cli("chat", pack, stdin=b"caf\xe9\n"), 2, "UTF-8")
    check_failure(cli("run", pack, "--system", "\udcff", "-p", "a"), 2, "--system is not UTF-8", "0xff")
    check_failure(cli("chat", pack, "--system", "\udcff"), 2, "--system is not UTF-8")


@pytest.mark.parametrize(
    "option",
    ["--temperature=-1", "--temperature=nan", "--top-p=0", "--top-p=1.5", "--min-p=2", "--top-k=-1", "--seed=-1"],
)
def test_sampling_out_of_range(cli: Cli, pack: Path, option: str) -> None:
    check_failure(cli("run", pack, "--prompt", "a", option), 2, "expected")


@pytest.mark.parametrize("value", ["0.7", True, 1e9, [0.7]])
def test_recommended_sampling_that_makes_no_sense(cli: Cli, copy: Path, value: Any) -> None:
    set_text(copy, generation={"temperature": value, "do_sample": True})
    check_failure(cli("chat", copy, stdin="a\n"), 1, "text.json", "temperature is", "--temperature")
    assert cli("chat", copy, "--temperature", 0, "-n", 2, stdin="a\n").returncode == 0


def test_text_files(cli: Cli, pack: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"good \xff bad")
    check_failure(cli("eval", "ppl", pack, "--text-file", text), 2, "not UTF-8", "byte 5 is 0xff")
    text.write_bytes(b"")
    check_failure(cli("eval", "ppl", pack, "--text-file", text), 2, "empty")
    check_failure(cli("eval", "ppl", pack, "--text-file", tmp_path / "none"), 2, "No such file")
    check_failure(cli("eval", "ppl", pack, "--text-file", tmp_path), 2, "directory")
    text.write_bytes(b"words " * 50)
    check_failure(cli("eval", "ppl", pack, "--text-file", text, "--ctx", 512), 2, "at most 256")


def test_names_that_are_nothing(cli: Cli, tmp_path: Path) -> None:
    check_failure(cli("run", tmp_path / "none", "--prompt", "a"), 2, "does not exist", "org/name")
    check_failure(cli("pull", "nonsense"), 2, "org/name")
    for command in (("run", "-p", "a"), ("pack", tmp_path / "out"), ("inspect",), ("pull",)):
        name, *rest = command
        check_failure(cli(name, "n" * 300, *rest), 2, *(["File name too long"] if name != "pull" else []))
        check_failure(cli(name, "n" * 300 + "/name", *rest), 2, "File name too long")
    check_failure(cli("verify", "n" * 300), 1, "File name too long")
    check_failure(cli("inspect", tmp_path), 1, "config.json")
    (tmp_path / "file.gguf").write_bytes(b"GGUF\x03\x00")
    check_failure(
        cli("run", tmp_path / "file.gguf", "--prompt", "a", "--cache-dir", tmp_path / "cache"), 1, "file.gguf"
    )


def test_a_name_that_is_not_utf_8(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    name = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    os.symlink(checkpoint, name)
    assert cli("run", name, "-p", "a", "-n", 1, "--cache-dir", tmp_path / "cache").returncode == 0
    shutil.copytree(checkpoint, name + "2")
    assert cli("run", name + "2", "-p", "a", "-n", 1, "--cache-dir", tmp_path / "cache").returncode == 0


def test_what_is_asked_is_checked_before_packing(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    cache = ("--cache-dir", tmp_path / "cache")
    run = ("run", checkpoint, "-p", "a", *cache)
    check_failure(cli(*run, "--host-budget-gb", 1), 2, "--device cuda")
    check_failure(cli(*run, "--budget-gb", 0), 2, "above 0")
    check_failure(cli(*run, "--context", 257), 2, "at most 256")
    check_failure(cli("eval", "ppl", checkpoint, "--text-file", __file__, "--ctx", 257, *cache), 2, "at most 256")
    for options in ({"context": 257}, {"host_budget_gb": 1.0}, {"device": "tpu"}, {"context": 0}):
        with pytest.raises(UsageError):
            flashrt.load(checkpoint, cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("cache/packs/*/*"))


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied", "/a/b"), OSError("odd")])
def test_any_other_failure_of_the_system_is_one_line(capsys: pytest.CaptureFixture[str], error: OSError) -> None:
    def fails() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        guarded(fails)()
    assert end.value.code == 1
    assert capsys.readouterr().err in ("error: /a/b: Permission denied\n", "error: odd\n")


def test_an_output_that_is_full(pack: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "inspect", str(pack)], stdout=full, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr.decode()) == (1, "error: No space left on device\n")


@pytest.mark.parametrize(
    ("stdout", "stderr", "reason"),
    [("cuckoo", "", "cuckoo"), ("[1]\\n{}\\nnull", "", "null"), ("cuckoo", "Boom: here", "Boom: here")],
)
def test_a_packer_whose_libraries_print(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stdout: str, stderr: str, reason: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nprintf '{stdout}\\n\\377\\n' | head -n -1\nprintf '{stderr}' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(CheckpointError, match=f"packing .* failed: {reason}$"):
        resolve(checkpoint, tmp_path / "cache")


def test_usage_errors_of_the_command_line(cli: Cli, pack: Path) -> None:
    for arguments in (["rnu"], ["run"], ["run", pack, "--budget-gb", "much"], ["run", pack, "--dtype", "int3"]):
        result = cli(*arguments)
        assert result.returncode == 2
        assert "Traceback" not in result.stderr
        assert result.stdout == ""


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path, where: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 4
    path.write_bytes(data)


DAMAGE: list[tuple[str, Callable[[Path], None]]] = [
    ("layer-001.safetensors", Path.unlink),
    ("layer-001.safetensors", truncate),
    ("layer-001.safetensors", flip),
    ("resident.safetensors", flip),
    ("resident.safetensors", lambda path: flip(path, 0.0)),
    ("tokenizer.json", Path.unlink),
    ("tokenizer.json", flip),
    ("manifest.json", Path.unlink),
    ("manifest.json", truncate),
    ("manifest.json", flip),
    ("manifest.json", lambda path: os.truncate(path, 0)),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGE)
def test_damaged_packs(cli: Cli, copy: Path, file: str, damage: Callable[[Path], None]) -> None:
    damage(copy / file)
    check_failure(cli("run", copy, "--prompt", "hello", "--json"), 1, file)
    check_failure(cli("verify", copy), 1, file)


def absurd(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(body: dict[str, Any]) -> None:
        body[field] = value

    return change


def outside(body: dict[str, Any]) -> None:
    body["files"]["../../etc/passwd"] = body["files"].pop("resident.safetensors")


def huge(body: dict[str, Any]) -> None:
    body["files"]["resident.safetensors"]["bytes"] = 1 << 60


def endless(body: dict[str, Any]) -> None:
    body["spec"]["layers"][0]["count"] = 1 << 40


@pytest.mark.parametrize(
    "change",
    [
        absurd("version", 99),
        absurd("block_bytes", 1 << 40),
        absurd("block_bytes", 0),
        absurd("dtype", "int3"),
        absurd("spec", {}),
        outside,
        huge,
        endless,
    ],
)
def test_absurd_manifests(cli: Cli, copy: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Manifests whose checksum is right: made to mislead, rather than damaged."""
    path = copy / "manifest.json"
    body = json.loads(path.read_bytes())
    body.pop("checksum")
    change(body)
    path.write_text(json.dumps(body | {"checksum": _checksum(body)}))
    check_failure(cli("run", copy, "--prompt", "hello"), 1, "manifest.json")


def test_checkpoints_that_cannot_be_packed(cli: Cli, checkpoint: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(checkpoint, tmp_path / "bad"))
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    check_failure(cli("pack", bad, tmp_path / "out"), 1, "mamba", "llama")
    (bad / "config.json").write_text(json.dumps(config | {"hidden_size": 80}))
    check_failure(cli("pack", bad, tmp_path / "out"), 1, "shape")
    (bad / "config.json").write_text(json.dumps(config))
    truncate(bad / "model.safetensors")
    check_failure(cli("pack", bad, tmp_path / "out"), 1, "truncated")
    check_failure(cli("run", bad, "--prompt", "a", "--cache-dir", tmp_path / "cache"), 1, "truncated")
    assert not (tmp_path / "out" / "manifest.json").exists()
