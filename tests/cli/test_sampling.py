"""Sampling on the command line: what authors recommend, and what is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli, check_failure
from tests.families import tiny_checkpoint


@pytest.mark.parametrize(
    ("fields", "status"),
    [({"do_sample": True, "temperature": 0.7, "top_k": -1}, 0), ({"do_sample": True, "top_k": -5}, 1)],
)
def test_chat_starts(cli: Cli, tmp_path: Path, fields: dict[str, Any], status: int) -> None:
    _, directory = tiny_checkpoint("llama", tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps(fields))
    result = cli("chat", directory, "-n", 3, stdin="the\n")
    if status:
        check_failure(result, 1, "top_k is -5", "--top-k")
    else:
        assert result.returncode == 0, result.stderr


def test_penalties_change_the_text(cli: Cli, pack: Path) -> None:
    texts = [
        cli("run", pack, "-p", "the thing", "-n", 40, "--ignore-eos", *options).stdout
        for options in ((), ("--presence-penalty", 2), ("--frequency-penalty", -2), ("--frequency-penalty", 0))
    ]
    assert len(set(texts[:3])) == 3
    assert texts[3] == texts[0]
    check_failure(cli("run", pack, "-p", "the", "--presence-penalty", 3), 2, "presence_penalty is 3")
