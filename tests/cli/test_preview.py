"""Planning with a hub repository before it is downloaded: the plan of its pack, from headers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashrt.errors import CheckpointError
from flashrt.storage.sources import open_checkpoint, preview
from tests.cli.conftest import Cli, check_failure
from tests.cli.hub import Hub, serving
from tests.families import tiny_checkpoint, tiny_gguf
from tests.kept import CASES
from tests.quantized import FORMATS, quantized_checkpoint

WIDE: dict[str, Any] = {"vocab_size": 131, "hidden_size": 96, "intermediate_size": 16384, "head_dim": 16}
CASE_NAMES = ("llama", "tied", "sharded", "gguf", "rope", "int4", "gptq", "fp8")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path / "hub") as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield found


def repository(root: Path, case: str) -> tuple[str, Path]:
    """(the name of a repository below `root`, the checkpoint that is in it)."""
    path = root / "org" / case
    path.parent.mkdir(parents=True)
    if case == "llama":
        return "org/llama", tiny_checkpoint("llama", path, dtype=torch.bfloat16, **WIDE)[1]
    if case == "tied":  # and the head is stored all the same
        tiny_checkpoint("llama", path, dtype=torch.bfloat16, tie_word_embeddings=True, **WIDE)
        tensors = load_file(path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path / "model.safetensors")
        return "org/tied", path
    if case == "sharded":
        model, _ = tiny_checkpoint("llama", path, **WIDE)
        (path / "model.safetensors").unlink()
        model.save_pretrained(path, max_shard_size="3MB")
        (path / "consolidated.safetensors").write_bytes(b"not wanted")
        return "org/sharded", path
    if case in ("gguf", "rope"):
        path.mkdir()
        (path / "model-Q8_0.gguf").write_bytes(b"another")
        out = path / "model-Q4_K_M.gguf"
        if case == "gguf":
            return "org/gguf:Q4_K_M", CASES["k"].write(out)
        return "org/rope:Q4_K_M", tiny_gguf("llama-llama3", out)[1]
    own = FORMATS[case]
    quantized_checkpoint(own, path.parent / "made", **own.extra)[0].rename(path)
    return f"org/{case}", path


@pytest.mark.parametrize("case", CASE_NAMES)
def test_a_plan_from_headers_is_the_plan_of_the_pack(cli: Cli, hub: Hub, case: str, tmp_path: Path) -> None:
    name, checkpoint = repository(hub.root, case)
    options = ("--budget-gb", 1, "--context", 128, "--cache-dir", tmp_path / "cache", "--json")
    found = cli("plan", name, *options)
    assert found.returncode == 0, found.stderr
    plan = json.loads(found.stdout)
    packed = cli("pack", checkpoint, tmp_path / "pack")
    assert packed.returncode == 0, packed.stderr
    expected = json.loads(cli("plan", tmp_path / "pack", *options).stdout)
    for key in ("weight_bytes", "streamed_bytes_per_token", "pack_bytes", "resident_share", "context"):
        assert plan[key] == expected[key], key
    assert plan["smallest_budget_bytes"] == pytest.approx(expected["smallest_budget_bytes"], rel=0.05)
    files = [checkpoint] if checkpoint.is_file() else [checkpoint / file for file in hub.sent]
    assert plan["download_bytes"] == sum(file.stat().st_size for file in files)
    assert expected["download_bytes"] is None
    assert not list((tmp_path / "cache").glob("outline-*"))
    assert not (tmp_path / "cache" / "packs").exists()


def test_weights_are_not_downloaded(cli: Cli, hub: Hub, tmp_path: Path) -> None:
    name, checkpoint = repository(hub.root, "llama")
    weights = checkpoint / "model.safetensors"
    assert weights.stat().st_size > 4 * preview.FIRST_BYTES
    found = cli("plan", name, "--budget-gb", 1, "--cache-dir", tmp_path)
    assert "download          " in found.stdout
    assert "of which only headers were read\npack              " in found.stdout
    assert hub.sent[weights.name] <= preview.FIRST_BYTES


@pytest.mark.parametrize("case", ["gguf", "sharded", "rope"])
def test_a_long_header_is_read_in_parts(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF's holds the vocabulary, and does not say how long it is."""
    name, checkpoint = repository(tmp_path, case)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    asked: list[tuple[str, int]] = []

    def read(_: str, file: str, start: int, stop: int) -> tuple[bytes, int]:
        asked.append((file, start))
        data = (folder / file).read_bytes()
        return data[start:stop], len(data)

    monkeypatch.setattr(preview, "_read", read)
    monkeypatch.setattr(preview, "FIRST_BYTES", 100)
    monkeypatch.setattr(preview, "listing", lambda _: [path.name for path in folder.iterdir()])
    found = preview.open_preview(name, tmp_path / "out")
    assert found is not None
    assert any(start for _, start in asked)
    with found.checkpoint as previewed, open_checkpoint(checkpoint) as whole:
        previewed.validate()
        assert previewed.spec == whole.spec
        assert previewed.text_files() == whole.text_files()
        assert previewed.reader.tensors.keys() == whole.reader.tensors.keys()


def test_what_is_not_there_is_named(cli: Cli, hub: Hub, tmp_path: Path) -> None:
    options = ("--budget-gb", 1, "--cache-dir", tmp_path)
    name, checkpoint = repository(hub.root, "llama")
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "unheard"}))
    check_failure(cli("plan", name, *options), 1, "architecture 'unheard' is not supported")
    (checkpoint / "config.json").unlink()
    check_failure(cli("plan", name, *options), 1, "config.json is missing")
    (hub.root / "org" / "pickled").mkdir()
    (hub.root / "org" / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    check_failure(cli("plan", "org/pickled", *options), 1, "a pickle, which is not read")


def test_a_hub_without_ranges(cli: Cli, hub: Hub, tmp_path: Path) -> None:
    """Whose files begin with what was asked for all the same."""
    hub.ranges = False
    name, _ = repository(hub.root, "llama")
    found = cli("plan", name, "--budget-gb", 1, "--cache-dir", tmp_path, "--json")
    assert found.returncode == 0, found.stderr


def test_an_empty_file_has_no_ranges(cli: Cli, hub: Hub, tmp_path: Path) -> None:
    name, checkpoint = repository(hub.root, "llama")
    (checkpoint / "chat_template.jinja").write_text("")
    found = cli("plan", name, "--budget-gb", 1, "--cache-dir", tmp_path)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("file", ["../../model-evil.safetensors", "/tmp/model-evil.safetensors"])
def test_names_that_leave_a_repository_are_refused(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview, "PATTERNS", ("*",))
    monkeypatch.setattr(preview, "listing", lambda _: ["model.safetensors", file])
    monkeypatch.setattr(preview, "_fetch", lambda *_: 0)
    with pytest.raises(CheckpointError, match=r"no place in a repository"):
        preview.open_preview("org/name", tmp_path / "a" / "b")


def test_nothing_is_downloaded_where_the_hub_does_not_answer(cli: Cli, hub: Hub, tmp_path: Path) -> None:
    name, _ = repository(hub.root, "llama")
    hub.lists = False
    check_failure(cli("plan", name, "--budget-gb", 1, "--cache-dir", tmp_path), 1, "is not in the local cache")
    assert not hub.sent


@pytest.mark.parametrize("data", [b"GGUX" + bytes(99), b"GGUF" + (1).to_bytes(4, "little") + bytes(99)])
def test_a_file_of_another_format_is_refused_at_once(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def read(_: str, file: str, start: int, stop: int) -> tuple[bytes, int]:
        asked.append(stop)
        return data[start:stop], 1 << 33

    monkeypatch.setattr(preview, "_read", read)
    monkeypatch.setattr(preview, "listing", lambda _: ["model.gguf"])
    with pytest.raises(CheckpointError):
        preview.open_preview("org/name", tmp_path)
    assert asked == [preview.FIRST_BYTES]
