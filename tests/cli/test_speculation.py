"""Drafts, as a user asks for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from tests.families import tiny_checkpoint

PROMPT = "the cat and the hat and the cat and the"


def report(cli: Cli, pack: Path, *options: object) -> Any:
    result = cli("run", pack, "--prompt", PROMPT, "--max-new-tokens", 40, "--ignore-eos", "--json", *options)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def draft(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pack of another tiny model with the tokens of `pack`."""
    root = tmp_path_factory.mktemp("draft")
    _, checkpoint = tiny_checkpoint("llama", root / "checkpoint", seed=9)
    assert cli("pack", checkpoint, root / "pack").returncode == 0
    return root / "pack"


@pytest.mark.parametrize("sampling", [(), ("--temperature", 0.9, "--seed", 3)], ids=["greedy", "drawn"])
def test_the_text_is_the_same(cli: Cli, pack: Path, draft: Path, sampling: tuple[object, ...]) -> None:
    off = report(cli, pack, "--speculate", "off", *sampling)
    assert off["tokens_per_pass"] == 1
    assert off["acceptance"] is None
    for options in (["auto"], [4], ["auto", "--draft", draft], ["auto", "--draft", pack]):
        found = report(cli, pack, "--speculate", *options, *sampling)
        assert found["token_ids"] == off["token_ids"]
        assert found["tokens_per_pass"] >= 1
        assert len(found["acceptance"]) <= found["plan"]["positions_per_pass"] - 1


def test_figures_say_how_many_tokens_a_pass_gave(cli: Cli, pack: Path) -> None:
    """A tiny model soon repeats itself, which the text foretells."""
    result = cli("run", pack, "--prompt", PROMPT, "--max-new-tokens", 200, "--ignore-eos")
    assert result.returncode == 0
    assert " tokens per pass · " in result.stderr


def test_plan_says_who_drafts(cli: Cli, pack: Path) -> None:
    assert "drafts            by the text, up to 12 tokens" in cli("plan", pack).stdout
    assert "drafts" not in cli("plan", pack, "--speculate", "off").stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--speculate", "17"), "expected off, auto or 2 to 16"),
        (("--speculate", "maybe"), "expected off, auto or 2 to 16"),
        (("--speculate", "off", "--draft", "."), "--draft needs drafts"),
        (("--draft", "/nowhere"), "does not exist"),
    ],
)
def test_what_makes_no_sense_is_refused(cli: Cli, pack: Path, options: tuple[str, ...], message: str) -> None:
    result = cli("run", pack, "--prompt", "a", *options)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_draft_with_other_tokens_is_refused(cli: Cli, pack: Path, tmp_path: Path) -> None:
    _, checkpoint = tiny_checkpoint("llama", tmp_path / "checkpoint", seed=9)
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert cli("pack", checkpoint, tmp_path / "pack").returncode == 0
    result = cli("run", pack, "--prompt", "a", "--max-new-tokens", 4, "--draft", tmp_path / "pack")
    assert result.returncode != 0
    assert "its tokenizer is another one" in result.stderr
