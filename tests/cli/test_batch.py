"""flashrt batch: one answer for each line, the texts of `flashrt run`, and what a kill leaves behind."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from flashrt.batch.lines import lines
from flashrt.batch.output import Output
from flashrt.errors import UsageError
from tests.cli.conftest import Cli, Launch
from tests.families import VOCAB

PROMPTS = 9


def request(number: int, **body) -> dict:
    ids = np.random.default_rng(number).integers(3, VOCAB, 3 + 5 * number).tolist()
    asked = {"model": "tiny", "prompt": ids, "max_tokens": 4 + number, "ignore_eos": True} | body
    return {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions", "body": asked}


def written(path: Path, records) -> Path:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in records))
    return path


def read(path: Path) -> dict[int, dict]:
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({record["line"] for record in found}) == len(found), "a line is answered once"
    return {record["line"]: record for record in found}


def text(record: dict) -> str:
    return record["response"]["body"]["choices"][0]["text"]


def plain(records: dict[int, dict]) -> dict[int, dict]:
    """Without the time."""
    for record in records.values():
        record["response"]["body"].pop("created", None)
    return records


@pytest.fixture(scope="session")
def name(cli: Cli, pack: Path) -> str:
    return json.loads(cli("inspect", pack, "--json").stdout)["name"]


def requests(name: str) -> list[dict]:
    drawn = {"temperature": 0.8, "n": 2}
    return [request(i, model=name, **(drawn if i % 3 == 1 else {"temperature": 0})) for i in range(PROMPTS)]


def test_answers_are_those_of_one_at_a_time(cli: Cli, pack: Path, name: str, tmp_path: Path) -> None:
    asked = written(tmp_path / "in.jsonl", requests(name))
    for sequences in (1, 4, 11):
        done = cli("batch", pack, asked, tmp_path / f"{sequences}.jsonl", "--sequences", sequences, "--json")
        assert done.returncode == 0, done.stderr
        figures = json.loads(done.stdout)
        assert figures["sequences"] == sequences
        assert figures["answered"] == PROMPTS
    alone, few, many = (plain(read(tmp_path / f"{n}.jsonl")) for n in (1, 4, 11))
    assert alone == few == many
    assert [record["custom_id"] for _, record in sorted(many.items())] == [f"id-{i}" for i in range(PROMPTS)]
    assert many[3]["response"]["body"]["usage"]["completion_tokens"] == 6


def test_bad_lines_get_errors_in_their_place(cli: Cli, pack: Path, name: str, tmp_path: Path) -> None:
    good = request(0, model=name)
    bad = [
        "{\n",
        "[1]\n",
        good | {"custom_id": "a", "method": "GET"},
        good | {"custom_id": "b", "url": "/v1/embeddings"},
        good | {"custom_id": "c", "more": 1},
        good | {"custom_id": 7},
        request(1, model="another"),
        request(2, model=name, stream=True),
        request(3, model=name, max_tokens=100_000),
        request(4, model=name, temperature="hot"),
        good,
    ]
    asked = written(tmp_path / "in.jsonl", [good, "\n", *bad])
    done = cli("batch", pack, asked, tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "out.jsonl")
    assert sorted(found) == [1, *range(3, 3 + len(bad))]
    assert found.pop(1)["error"] is None
    for record in found.values():
        assert record["error"]["message"]
        assert 400 <= record["response"]["status_code"] < 500
    assert "line 1" in found[13]["error"]["message"], "a custom_id that was taken"
    assert found[9]["response"]["status_code"] == 404
    again = cli("batch", pack, asked, tmp_path / "out.jsonl", "--json")
    assert json.loads(again.stdout) == {"answered": 0, "answered_before": 12}


def test_prompts_one_a_line(cli: Cli, pack: Path, tmp_path: Path) -> None:
    asked = tmp_path / "prompts.txt"
    asked.write_text("def f(x):\n\nhello\n")
    done = cli("batch", pack, asked, tmp_path / "out.jsonl", "-n", 5, "--raw")
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "out.jsonl")
    assert [found[n]["custom_id"] for n in (1, 3)] == ["line-1", "line-3"]
    run = cli("run", pack, "--prompt", "hello", "-n", 5, "--raw")
    assert run.stdout == text(found[3]) + "\n"
    done = cli("batch", pack, asked, tmp_path / "asked.jsonl", "-n", 5)
    assert done.returncode == 0, done.stderr
    asked_for = read(tmp_path / "asked.jsonl")[3]["response"]["body"]["choices"][0]["message"]["content"]
    assert cli("run", pack, "--prompt", "hello", "-n", 5).stdout == asked_for + "\n"


def test_a_killed_run_goes_on(cli: Cli, launch: Launch, long_pack: Path, tmp_path: Path) -> None:
    name = json.loads(cli("inspect", long_pack, "--json").stdout)["name"]
    asked, out = written(tmp_path / "in.jsonl", requests(name)), tmp_path / "out.jsonl"
    cli("batch", long_pack, asked, tmp_path / "whole.jsonl", "--sequences", 2)
    random, held = np.random.default_rng(), 0
    for _ in range(3):
        running = launch("batch", long_pack, asked, out, "--sequences", 2)
        while running.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") <= held):
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.2))
        running.send_signal(signal.SIGKILL)
        running.wait()
        held = out.read_bytes().count(b"\n")
    with out.open("a") as handle:
        handle.write('{"id": "batch_req_to')  # as a kill may leave it
    done = cli("batch", long_pack, asked, out, "--sequences", 2)
    assert done.returncode == 0, done.stderr
    assert plain(read(out)) == plain(read(tmp_path / "whole.jsonl"))


def test_another_output_is_refused(cli: Cli, pack: Path, name: str, tmp_path: Path) -> None:
    asked, out = written(tmp_path / "in.jsonl", requests(name)[:2]), tmp_path / "out.jsonl"
    cli("batch", pack, asked, out)
    written(asked, requests(name)[2:4])
    other = cli("batch", pack, asked, out)
    assert other.returncode == 2
    assert "another line 1" in other.stderr
    written(asked, requests(name)[:1])
    assert "has not" in cli("batch", pack, asked, out).stderr
    out.write_text("a diary\n")
    assert "no answer of a batch" in cli("batch", pack, asked, out).stderr
    assert out.read_text() == "a diary\n"
    assert cli("batch", pack, asked, asked).returncode == 2
    assert "cannot be read" in cli("batch", pack, tmp_path / "none.jsonl", tmp_path / "o.jsonl").stderr


def test_one_process_writes(tmp_path: Path) -> None:
    with Output(tmp_path / "out.jsonl"), pytest.raises(UsageError, match="another process"):
        Output(tmp_path / "out.jsonl")


def test_long_lines_are_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_bytes(b"a\n" + b"x" * 1000 + b"\n\nb")
    found = list(lines(path, 100))
    assert [(line.number, line.data) for line in found] == [(1, b"a"), (2, None), (4, b"b")]
