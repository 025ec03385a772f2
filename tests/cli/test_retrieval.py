"""flashrt eval retrieval, as its users run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashrt.calibration.retrieval import Answer
from flashrt.cli.retrieval import accuracy, parsed_lengths
from flashrt.errors import UsageError
from tests.cli.conftest import Cli, check_failure


@pytest.fixture(scope="module")
def asked(cli: Cli, long_pack: Path) -> Any:
    def run(*arguments: object) -> Any:
        common = ("--lengths", "700, 650", "--needles", 2, "--samples", 1, "--seed", 3)
        return cli("eval", "retrieval", long_pack, *common, *arguments)

    return run


def test_json(asked: Any, long_pack: Path) -> None:
    done = asked("--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {task: list(cells) for task, cells in found["accuracy"].items()} == {
        "line": ["650", "700"],
        "key-value": ["650", "700"],
    }
    assert len(found["answers"]) == 8
    assert found["prefill_tok_per_s"] > 0
    assert found["decode_tok_per_s"] > 0
    assert found["options"]["threads"] == 1
    assert found["options"]["speculate"] == "off"
    assert found["peak_rss_bytes"] <= found["budget_bytes"]
    assert found["answers"] == json.loads(asked("--json", "--threads", 2).stdout)["answers"]


def test_table(asked: Any) -> None:
    done = asked()
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert lines[0].split() == ["prompt", "tokens", "line", "key-value"]
    assert [line.split()[0] for line in lines if "%" in line] == ["650", "700"]
    assert lines[-1].startswith("8 questions, seed 3, prefill ")


def test_refusals(cli: Cli, pack: Path, long_pack: Path) -> None:
    check_failure(cli("eval", "retrieval", pack, "--lengths", 4096), 2, "at most 256")
    check_failure(cli("eval", "retrieval", pack, "--lengths", "128,x"), 2, "'128,x'", "4096,8192")
    check_failure(cli("eval", "retrieval", long_pack, "--lengths", 300), 2, "300 tokens has room for 0 lines")


@pytest.mark.parametrize("text", ["", "0", "128,", "-128", "1.5", "1e3", "9999999999"])
def test_lengths_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--lengths is"):
        parsed_lengths(text)


def test_lengths_are_sorted() -> None:
    assert parsed_lengths(" 8192,4096, 8192") == [4096, 8192]


def test_accuracy_is_by_task_and_length() -> None:
    found = [Answer("line", 64, 0.0, "1", said) for said in ("1", "2", "1", "1")]
    found += [Answer("line", 128, 0.0, "1", "1"), Answer("key-value", 64, 0.0, "1", "")]
    assert accuracy(found) == {"line": {"64": 0.75, "128": 1.0}, "key-value": {"64": 0.0}}
