"""`flashrt calibrate --kv` from the command line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

from flashrt.storage.kv_labels import read_labels, write_labels
from flashrt.storage.pack import Pack
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
    verified, inspected = parsed(cli("verify", pack, "--json")), parsed(cli("inspect", pack, "--json"))
    assert verified["kv_labels"]
    assert (inspected["kv_labels"]["layers"], inspected["kv_labels"]["losses"]) == (3, found["losses"])
    assert "at 1/16" in cli("inspect", pack).stdout


def test_damaged_labels_are_found(cli: Cli, pack: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    pack = Path(shutil.copytree(pack, tmp_path / "pack", ignore=shutil.ignore_patterns("kv-labels*")))
    assert "none; `flashrt calibrate" in cli("inspect", pack).stdout
    assert not parsed(cli("verify", pack, "--json"))["kv_labels"]
    assert cli("calibrate", pack, "--kv", "--text-file", text, "--tokens", 768).returncode == 0
    labels = pack / "kv-labels.safetensors"
    raw = labels.read_bytes()
    labels.write_bytes(raw[:-9] + bytes([raw[-9] ^ 4]) + raw[-8:])
    check_failure(cli("verify", pack), 1, "kv-labels.safetensors is damaged", "calibrate")
    assert "kv-labels.safetensors is damaged" in cli("inspect", pack).stdout


def test_keys_and_values_go_where_they_are_told(cli: Cli, pack: Path, tmp_path: Path) -> None:
    """Every command that loads takes --kv-dir."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    commands = (
        ("calibrate", pack, "--kv", "--text-file", text, "--tokens", 768),
        ("eval", "ppl", pack, "--text-file", text, "--ctx", 64, "--max-tokens", 64),
        ("bench", pack, "--prompt-tokens", 8, "--new-tokens", 2, "--repeat", 1),
    )
    for command in commands:
        result = cli(*command, "--kv-dir", tmp_path)
        assert result.returncode == 0, result.stderr


def test_calibrate_kv_refuses_what_makes_no_sense(cli: Cli, pack: Path, tmp_path: Path) -> None:
    check_failure(cli("calibrate", pack, "--kv", "--max-loss", 0.1), 2, "--max-loss is not for --kv")
    check_failure(cli("calibrate", pack, "--kv", "--tokens", 100), 2, "tokens is 100, expected 512 or more")
    _, checkpoint = tiny_checkpoint("mistral", tmp_path / "mistral")
    assert cli("pack", checkpoint, tmp_path / "windows").returncode == 0
    check_failure(cli("calibrate", tmp_path / "windows", "--kv"), 1, "all layers of this model see a window")


def test_what_is_not_measured_is_not_promised(cli: Cli, pack: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert cli("calibrate", pack, "--kv", "--text-file", text, "--tokens", 768).returncode == 0
    path, opened = pack / "kv-labels.safetensors", Pack(pack)
    assert set(read_labels(opened).losses) == {"1/4", "1/8", "1/16", "1/32"}

    def stated(losses: dict[str, float]) -> None:
        labels = replace(read_labels(opened), losses=losses)
        path.unlink()
        write_labels(pack, labels, opened.spec)

    stated({})
    sparse = ("run", pack, "-p", "the", "-n", 3, "--kv", "sparse")
    check_failure(cli(*sparse, "--max-loss", 0.02), 2, "its loss was not measured", "Leave --max-loss out")
    stated({"1/16": 0.01})
    found = parsed(cli(*sparse, "--max-loss", 0.02, "--json"))
    assert (found["kv_keep"], found["kv_loss"]) == (1 / 16, 0.01)
    scaled = (*sparse, "--rope-scaling", "yarn:4")
    assert parsed(cli(*scaled, "--json"))["kv_loss"] is None
    check_failure(cli(*scaled, "--max-loss", 0.02), 2, "its loss was not measured for this pack and rotation")
    check_failure(cli(*sparse, "--max-loss", 0.005), 2, "measured were: 1/16 +1.00%")
    assert parsed(cli(*sparse, "--max-loss", 0.005, "--kv-keep", 1, "--json"))["kv_loss"] == 0
    bench = ("bench", pack, "--prompt-tokens", 80, "--new-tokens", 4, "--repeat", 1, "--kv", "sparse", "--json")
    assert json.loads(cli(*bench).stdout)["plan"]["kv_keep"] == 1 / 16
    scores = ("eval", "ppl", pack, "--text-file", text, "--max-tokens", 200, "--ctx", 200, "--json")
    exact, decoded, kept = (parsed(cli(*scores, *own)) for own in ((), ("--as-decoded",), ("--kv", "sparse")))
    assert [result["as_decoded"] for result in (exact, decoded, kept)] == [False, True, True]
    assert kept["ppl"] == decoded["ppl"], "rows attend to 512 positions at least"


def test_retrieval_takes_no_sessions(cli: Cli, pack: Path, tmp_path: Path) -> None:
    """It would ask none of its questions of them."""
    result = cli("eval", "retrieval", pack, "--session", tmp_path / "saved")
    assert (result.returncode, "No such option: --session" in result.stderr) == (2, True), result.stderr
