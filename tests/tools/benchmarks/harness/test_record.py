"""Records: one form, the same when read again, and honest about what was measured."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tools.benchmarks.harness import facts, record
from tools.benchmarks.harness.record import Benchmark
from tools.benchmarks.harness.samples import table

SAMPLES = [{"cap": "1", "speed": 2.5, "shares": [0.5, None]}, {"cap": "none", "speed": None, "shares": []}]
SUMMARY = {"text": ["é"], "tables": [table(["cap", ("speed", "number")], [["1", {"median": 2.5}]])]}


def published(out: Path, *given: str) -> dict[str, Any]:
    benchmark = Benchmark("tools.benchmarks.toy", "A toy.")
    benchmark.parser.add_argument("pack", type=Path)
    benchmark.parser.add_argument("--texts", type=Path, nargs="*")
    benchmark.parse([*given, "--out", str(out)])
    benchmark.publish({"tokens": 3}, SAMPLES, SUMMARY, machine={"gpu": "a GPU"}, versions={"peer": "1.2"})
    return record.load(out)


def test_a_round_trip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = published(tmp_path / "out.json", "pack")
    assert found == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["schema"], found["tool"], found["parameters"]) == (1, "toy", {"tokens": 3})
    assert (found["samples"], found["summary"]) == (SAMPLES, SUMMARY)
    assert found["machine"]["gpu"] == "a GPU"
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["isa"]
    assert found["versions"]["peer"] == "1.2"
    assert {"python", "flashrt", "numpy"} <= found["versions"].keys()
    assert found["date"].endswith("+00:00")


def test_a_sample_takes_a_line(tmp_path: Path) -> None:
    published(tmp_path / "out.json", "pack")
    lines = (tmp_path / "out.json").read_text().splitlines()
    assert f"  {json.dumps(SAMPLES[0])}," in lines
    assert f"  {json.dumps(SAMPLES[1])}" in lines


def test_a_command_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    found = published(tmp_path / "out.json", str(tmp_path / "a pack"), "--texts", str(tmp_path / "x.txt"), "y.txt")
    assert found["command"] == "python -m tools.benchmarks.toy 'a pack' --texts x.txt y.txt"


def test_other_files_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"tool": "bench_io"}')
    with pytest.raises(ValueError, match=r"old\.json is not a record of schema 1"):
        record.load(tmp_path / "old.json")


@pytest.mark.parametrize("value", [{}, [], {"a": [], "b": {"c": {"d": {"e": [1, {"f": 2}]}}}}, [[[[1]]]], "x", None])
def test_any_value_is_written_as_json(value: Any) -> None:
    assert json.loads(record.dumps(value)) == value


def test_the_commit_is_that_of_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = iter([{"hash": "a", "dirty": False}, {"hash": "b", "dirty": False}])
    monkeypatch.setattr(facts, "commit", lambda: next(commits))
    benchmark = Benchmark("tools.benchmarks.toy", "A toy.")
    benchmark.parse([])
    facts.commit()
    benchmark.publish({}, SAMPLES, SUMMARY)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["commit"]["hash"] == "a"


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


def test_a_commit_says_whether_files_differ(tmp_path: Path) -> None:
    assert facts.commit(tmp_path) is None
    git(tmp_path, "init")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "a")
    (tmp_path / "untracked").write_text("no part of the build")
    found = facts.commit(tmp_path)
    assert found is not None
    assert len(found["hash"]) == 40
    assert not found["dirty"]
    (tmp_path / "file").write_text("b")
    assert facts.commit(tmp_path) == {"hash": found["hash"], "dirty": True}
