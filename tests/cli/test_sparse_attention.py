"""`flashrt calibrate --kv` from the command line."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Cli, check_failure
from tests.cli.test_commands import parsed
from tests.families import tiny_checkpoint

TEXT = "the thing and the ring are in the inn, and another thing is in the ring. " * 40


def test_calibrate_kv_says_what_came_of_it(cli: Cli, pack: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = ("calibrate", pack, "--kv", "--text-file", text, "--tokens", 768)
    result = cli(*arguments)
    assert result.returncode == 0, result.stderr
    for word in ("layer", "error at 1/16", "at 1/32", "shares by KV head", "--kv sparse"):
        assert word in result.stdout
    found = parsed(cli(*arguments, "--json"))
    assert found["block"] == 8
    assert found["channels"] == [8, 8, 8]
    assert all(0 < error < 1 for error in found["errors"])
    assert (pack / "kv-labels.safetensors").exists()
    assert cli("verify", pack).returncode == 0


def test_calibrate_kv_refuses_what_makes_no_sense(cli: Cli, pack: Path, tmp_path: Path) -> None:
    check_failure(cli("calibrate", pack, "--kv", "--max-loss", 0.1), 2, "--max-loss is not for --kv")
    check_failure(cli("calibrate", pack, "--kv", "--tokens", 100), 2, "tokens is 100, expected 512 or more")
    _, checkpoint = tiny_checkpoint("mistral", tmp_path / "mistral")
    assert cli("pack", checkpoint, tmp_path / "windows").returncode == 0
    check_failure(cli("calibrate", tmp_path / "windows", "--kv"), 1, "all layers of this model see a window")
