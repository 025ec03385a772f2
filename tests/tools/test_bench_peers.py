"""The comparison with peers, with a stand-in for them: no peer's environment is needed, no figure is a real one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tools import bench_peers, machine
from tools.peers.measure import Perplexity, windows
from tools.peers.summary import cell, ratios
from tools.peers.systems import Flashrt, Job, Peer, Score, peers
from tools.run_in_cgroup import CgroupUnavailable, memory_cgroup

ROOT = Path(__file__).parents[2]
RUNNER = """
import time
from measure import Timeline, arguments, emit
args = arguments(None)
held = b"x" * (int(args.model.name) << 20)
timeline = Timeline(args.seconds)
for _ in range(1 + args.warm):
    timeline.ask()
    for token in range(args.tokens):
        time.sleep({pause})
        timeline.token(token)
        if timeline.late:
            break
emit(timeline.report(len(args.prompt_file.read_text())), "pytest")
"""


@pytest.fixture(autouse=True)
def warm_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropping the machine's page cache is nothing for a test to do."""
    monkeypatch.setattr(machine, "drop_page_cache", lambda: None)


@pytest.fixture
def cgroups() -> None:
    try:
        with memory_cgroup(1 << 26):
            pass
    except CgroupUnavailable as error:
        pytest.skip(f"no memory cgroup here: {error}")


def stand_in(folder: Path, mib: int = 1, pause: float = 0.01) -> Peer:
    """A runner that holds some memory and takes its time for each token."""
    runner = folder / "runner.py"
    runner.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'tools' / 'peers')!r})" + RUNNER.format(pause=pause))
    return Peer("stand-in", Path(sys.executable), runner, Path(str(mib)), "none")


def job(folder: Path, **changes: Any) -> Job:
    (folder / "prompt.txt").write_text("abc")
    settings = {"tokens": 5, "cap": "none", "threads": 1, "seconds": 20.0}
    return Job(folder / "prompt.txt", 3, **(settings | changes))


@pytest.mark.usefixtures("cgroups")
def test_a_run(tmp_path: Path) -> None:
    run = bench_peers.measure(stand_in(tmp_path), job(tmp_path, cap="0.25"))
    assert (run["status"], run["token_ids"], run["prompt_tokens"]) == ("ok", [0, 1, 2, 3, 4], 3)
    assert 0 < run["load_s"] < run["first_token_s"] < run["wall_s"]
    assert 20 < run["decode_tok_per_s"] < 100  # a hundredth of a second each, and some overhead
    assert run["bytes_read_per_token"] >= 0
    assert 1 << 20 < run["peak_rss_bytes"] < 1 << 28
    assert set(run["versions"]) == {"pytest"}


@pytest.mark.usefixtures("cgroups")
def test_a_warm_prompt_is_timed_the_second_time(tmp_path: Path) -> None:
    run = bench_peers.measure(stand_in(tmp_path, pause=0.2), job(tmp_path, tokens=1, warm=True))
    assert run["decode_tok_per_s"] is None
    assert 0.2 <= run["prefill_s"] < 0.4
    assert run["wall_s"] > 0.4


@pytest.mark.usefixtures("cgroups")
def test_a_killed_run_is_a_result(tmp_path: Path) -> None:
    run = bench_peers.measure(stand_in(tmp_path, mib=200), job(tmp_path, cap="0.0625"))
    assert run["status"] == "killed"
    assert "first_token_s" not in run
    assert cell([run, run])["status"] == "killed"


@pytest.mark.usefixtures("cgroups")
def test_what_a_slow_run_reached_is_kept(tmp_path: Path) -> None:
    run = bench_peers.measure(stand_in(tmp_path, pause=0.3), job(tmp_path, tokens=100, seconds=1.0))
    assert run["status"] == "timeout"
    assert 1 < len(run["token_ids"]) < 10


@pytest.mark.usefixtures("cgroups")
def test_a_run_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers, "GRACE_S", 0.0)
    run = bench_peers.measure(stand_in(tmp_path, pause=60), job(tmp_path, seconds=0.5))
    assert run["status"] == "timeout"
    assert run["wall_s"] < 10


@pytest.mark.usefixtures("cgroups")
def test_a_peer_that_reads_the_prompt_otherwise_is_no_comparison(tmp_path: Path) -> None:
    asked = job(tmp_path)
    asked.prompt.write_text("abcd")
    with pytest.raises(SystemExit, match="took the prompt for 4 tokens, not 3"):
        bench_peers.measure(stand_in(tmp_path), asked)


@dataclass
class Words:
    """A tokenizer of words."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


def test_a_prompt_of_so_many_tokens() -> None:
    assert bench_peers.cut(Words(), "one two three four", 3) == "one two t"  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="5 tokens exactly"):
        bench_peers.cut(Words(), "one two three four", 5)  # type: ignore[arg-type]


def test_systems_take_turns() -> None:
    assert [bench_peers.rotated(["a", "b", "c"], by) for by in range(4)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
        ["a", "b", "c"],
    ]


def ran(speed: float | None, status: str = "ok") -> dict[str, Any]:
    if speed is None:
        return {"status": status, "wall_s": 9.0, "message": "one\nno memory"}
    return dict.fromkeys(
        ("load_s", "prefill_s", "prefill_tok_per_s", "bytes_read_per_token", "read_bytes", "wall_s"), 1.0
    ) | {
        "status": status,
        "token_ids": [1, 2],
        "first_token_s": 1.0,
        "decode_tok_per_s": speed,
        "cgroup_peak_bytes": 10,
        "peak_rss_bytes": 9,
    }


def test_a_cell_is_the_median_of_what_ran() -> None:
    found = cell([ran(1.0), ran(5.0), ran(None, "killed"), ran(2.0)])
    assert (found["status"], found["runs"], found["decode_tok_per_s"]) == ("ok", 4, 2.0)
    assert found["decode_tok_per_s_all"] == [1.0, 5.0, 2.0]
    assert cell([ran(None, "failed")]) == {"status": "failed", "runs": 1, "wall_s": 9.0, "message": "no memory"}


def test_ratios_are_of_runs_side_by_side() -> None:
    runs = {
        "flashrt": {"1": [ran(10.0), ran(2.0), ran(8.0)], "0.5": [ran(1.0)]},
        "peer": {"1": [ran(5.0), ran(2.0), ran(1.0)], "0.5": [ran(None, "killed")]},
    }
    assert ratios(runs, "decode_tok_per_s") == {"1": {"peer": 2.0}}
    assert ratios({"peer": runs["peer"]}, "decode_tok_per_s") == {}


def test_perplexity_of_windows() -> None:
    import numpy as np

    assert windows([1, 2, 3, 4, 5], [0], 3) == [[0, 1, 2], [0, 3, 4], [0, 5]]
    assert windows([1, 2, 3], [], 2) == [[1, 2]]  # a window of one token predicts nothing
    perplexity = Perplexity()
    for probabilities in ([0.5, 0.25], [0.125]):
        perplexity.add(np.log(probabilities))
    assert perplexity.report()["tokens"] == 3
    assert math.isclose(perplexity.report()["ppl"], 4.0)


def test_flashrt_is_the_installed_program(tmp_path: Path) -> None:
    system = Flashrt(Path("bin/flashrt"), Path("pack"), "int4")
    assert system.command(job(tmp_path, cap="0.8"))[-2:] == ["--budget-gb", "0.8"]
    assert "--budget-gb" not in system.command(job(tmp_path))
    report = {"prompt_tokens": 3, "token_ids": [7], "ttft_s": 0.5, "decode_s": 2.0, "decode_tok_per_s": 4.0}
    figures = system.figures(json.dumps(report | {"bytes_read_per_token": 0.0}), wall_s=4.0)
    assert (figures["load_s"], figures["first_token_s"], figures["prefill_s"]) == (1.5, 2.0, 0.5)


def test_every_peer_can_be_started(tmp_path: Path) -> None:
    found = peers(tmp_path, Path("model-q4_k_m.gguf"), Path("model"), tmp_path)
    assert set(found) | {"flashrt"} == set(bench_peers.SYSTEMS)
    assert found["llama.cpp"].weights == "Q4_K_M"
    for peer in found.values():
        assert peer.runner.exists()
        assert str(peer.model) in peer.command(job(tmp_path))
        assert "a.txt" in peer.score_commands(Score([Path("a.txt")], 8, 4, 1))[0]


def test_command_line() -> None:
    command = [sys.executable, "-m", "tools.bench_peers", "--packs", "p", "--gguf", "g", "--checkpoint", "c"]
    done = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "cold page cache" in done.stdout
