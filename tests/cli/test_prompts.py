"""Prompts as people have them: with a byte order mark, with the beginning token that the model adds itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, check_failure, set_text

MARK = b"\xef\xbb\xbf"


def ids(cli: Cli, pack: Path, *arguments: object, stdin: bytes = b"") -> list[int]:
    result = cli("run", pack, "-n", 3, "--json", *arguments, stdin=stdin)
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout)["token_ids"])


def test_a_byte_order_mark_is_no_part_of_a_text(cli: Cli, pack: Path, tmp_path: Path) -> None:
    expected = ids(cli, pack, "--prompt", "the thing")
    (tmp_path / "x.txt").write_bytes(MARK + b"the thing")
    assert ids(cli, pack, "--prompt-file", tmp_path / "x.txt") == expected
    assert ids(cli, pack, stdin=MARK + b"the thing") == expected
    answers = [cli("chat", pack, "-n", 3, "--temperature", 0, stdin=mark + b"the\n").stdout for mark in (b"", MARK)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named(cli: Cli, pack: Path, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "x.txt").write_bytes(("\ufeffthe thing").encode(encoding))
    check_failure(cli("run", pack, "--prompt-file", tmp_path / "x.txt"), 2, "UTF-16", "save it as UTF-8")


def test_a_beginning_token_that_is_there_twice_is_said(cli: Cli, pack: Path) -> None:
    result = cli("run", pack, "--raw", "-p", "<s>the", "-n", 2)
    assert result.returncode == 0
    assert result.stderr.startswith("note: the prompt begins with <s>, which is put before every text anyway")
    assert "note" not in cli("run", pack, "--raw", "-p", "the <s>", "-n", 2).stderr


def test_a_model_with_a_template_answers(cli: Cli, pack: Path) -> None:
    def ids(*options: str) -> list[int]:
        return list(json.loads(cli("run", pack, "-p", "the ring", "-n", 6, "--json", *options).stdout)["token_ids"])

    assert ids() == ids("--chat") != ids("--raw")


def test_a_base_model_continues(cli: Cli, base_pack: Path) -> None:
    asked = cli("run", base_pack, "-p", "the ring", "-n", 6)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout == cli("run", base_pack, "-p", "the ring", "-n", 6, "--raw").stdout
    check_failure(cli("run", base_pack, "-p", "a", "--chat"), 2, "no chat template")
    check_failure(cli("run", base_pack, "-p", "a", "--system", "b"), 2, "no chat template")


def test_a_template_that_fails_names_the_way_out(cli: Cli, pack: Path, tmp_path: Path) -> None:
    broken = copied(pack, tmp_path / "broken", "{{ 1 / 0 }}")
    check_failure(cli("run", broken, "-p", "a"), 1, "chat template fails", "--raw")
    assert cli("run", broken, "-p", "a", "-n", 2, "--raw").returncode == 0


@pytest.fixture(scope="module")
def base_pack(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(pack, tmp_path_factory.mktemp("base") / "pack", None)


def copied(pack: Path, out: Path, template: str | None) -> Path:
    """A pack with another chat template."""
    shutil.copytree(pack, out)
    set_text(out, chat_template=template)
    return out
