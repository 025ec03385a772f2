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

from tests.tools.support import tiny_pack
from tools.benchmarks import page
from tools.benchmarks.harness import record, runs
from tools.benchmarks.peers import compare
from tools.benchmarks.peers.measure import Perplexity, windows
from tools.benchmarks.peers.plot import curves, draw
from tools.benchmarks.peers.summary import Comparison, summary
from tools.benchmarks.peers.systems import Flashrt, Job, Peer, Score, peers
from tools.run_in_cgroup import CgroupUnavailable, memory_cgroup

ROOT = Path(__file__).parents[3]
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
    monkeypatch.setattr(runs, "drop_page_cache", lambda: None)


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
    runner.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'tools' / 'benchmarks' / 'peers')!r})" + RUNNER.format(pause=pause)
    )
    return Peer("stand-in", Path(sys.executable), runner, Path(str(mib)), "none")


def job(folder: Path, **changes: Any) -> Job:
    (folder / "prompt.txt").write_text("abc")
    settings = {"tokens": 5, "cap": "none", "threads": 1, "seconds": 20.0}
    return Job(folder / "prompt.txt", 3, **(settings | changes))


@pytest.mark.usefixtures("cgroups")
def test_a_run(tmp_path: Path) -> None:
    run = compare.measure(stand_in(tmp_path), job(tmp_path, cap="0.25"))
    assert (run["status"], run["token_ids"], run["prompt_tokens"]) == ("ok", [0, 1, 2, 3, 4], 3)
    assert 0 < run["load_s"] < run["first_token_s"] < run["wall_s"]
    assert 20 < run["decode_tok_per_s"] < 100  # a hundredth of a second each, and some overhead
    assert run["bytes_read_per_token"] >= 0
    assert 1 << 20 < run["peak_rss_bytes"] < 1 << 28
    assert set(run["versions"]) == {"pytest"}


@pytest.mark.usefixtures("cgroups")
def test_a_warm_prompt_is_timed_the_second_time(tmp_path: Path) -> None:
    run = compare.measure(stand_in(tmp_path, pause=0.2), job(tmp_path, tokens=1, warm=True))
    assert run["decode_tok_per_s"] is None
    assert 0.2 <= run["prefill_s"] < 0.4
    assert run["wall_s"] > 0.4


@pytest.mark.usefixtures("cgroups")
def test_a_killed_run_is_a_result(tmp_path: Path) -> None:
    run = compare.measure(stand_in(tmp_path, mib=200), job(tmp_path, cap="0.0625"))
    assert run["status"] == "killed"
    assert "first_token_s" not in run


@pytest.mark.usefixtures("cgroups")
def test_what_a_slow_run_reached_is_kept(tmp_path: Path) -> None:
    run = compare.measure(stand_in(tmp_path, pause=0.3), job(tmp_path, tokens=100, seconds=1.0))
    assert run["status"] == "timeout"
    assert 1 < len(run["token_ids"]) < 10


@pytest.mark.usefixtures("cgroups")
def test_a_run_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "GRACE_S", 0.0)
    run = compare.measure(stand_in(tmp_path, pause=60), job(tmp_path, seconds=0.5))
    assert run["status"] == "timeout"
    assert run["wall_s"] < 10


@pytest.mark.usefixtures("cgroups")
def test_a_peer_that_reads_the_prompt_otherwise_is_no_comparison(tmp_path: Path) -> None:
    asked = job(tmp_path)
    asked.prompt.write_text("abcd")
    with pytest.raises(SystemExit, match="took the prompt for 4 tokens, not 3"):
        compare.measure(stand_in(tmp_path), asked)


@dataclass
class Words:
    """A tokenizer of words, and a system of no weight."""

    name: str = "words"
    weights: str = "w"

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]


def test_a_prompt_of_so_many_tokens() -> None:
    assert compare.cut(Words(), "one two three four", 3) == "one two t"  # type: ignore[arg-type]
    with pytest.raises(SystemExit, match="5 tokens exactly"):
        compare.cut(Words(), "one two three four", 5)  # type: ignore[arg-type]


SYSTEMS = {"flashrt": "int4", "peer": "Q4", "peer --flag": "Q4", "slow": "bf16"}
CAPS = ["none", "1", "0.5"]
SPEEDS = {  # by system and cap, of two rounds; None: killed
    "flashrt": {"none": (24.0, 22.0), "1": (20.0, 30.0), "0.5": (6.0, 4.0)},
    "peer": {"none": (12.0, 22.0), "1": (1.0, 1.0), "0.5": (None, None)},
    "peer --flag": {"none": (8.0, 11.0), "1": (4.0, 5.0), "0.5": (2.0, 2.0)},
    "slow": {"none": (2.0, 2.0), "1": (None, None), "0.5": (None, None)},
}


def ran(speed: float | None) -> dict[str, Any]:
    if speed is None:
        return {"status": "killed", "wall_s": 9.0, "message": "one\nno memory", "new_tokens": 0}
    figures = ("load_s", "prefill_s", "prefill_tok_per_s", "bytes_read_per_token", "read_bytes", "wall_s")
    peaks = {"cgroup_peak_bytes": 3 << 20, "peak_rss_bytes": 2 << 20}
    ends = {"status": "ok", "new_tokens": 12, "first_token_s": 1.25, "decode_tok_per_s": speed}
    return dict.fromkeys(figures, 2e6) | peaks | ends


def comparison() -> Comparison:
    samples: list[dict[str, Any]] = [
        {"phase": "decode", "system": system, "cap": cap, "round": turn} | ran(speed)
        for system, by_cap in SPEEDS.items()
        for cap, found in by_cap.items()
        for turn, speed in enumerate(found)
    ]
    prefill = {"flashrt": 100.0, "peer": 50.0}
    samples += [
        {"phase": "prefill", "system": system, "cap": "none", "round": 0} | ran(1.0) | {"prefill_tok_per_s": speed}
        for system, speed in prefill.items()
    ]
    samples += [{"phase": "disk", "round": n, "disk_plain_bytes_per_s": rate} for n, rate in enumerate((5e8, 2e9))]
    scores = {"flashrt int4": 2.2, "transformers bf16": 2.0}
    samples += [{"phase": "perplexity", "system": name, "text": "t", "ppl": ppl} for name, ppl in scores.items()]
    parameters = {"model": "m", "prompt": "def f(", "seconds": 60.0, "caps": CAPS, "prefill_tokens": 512}
    parameters |= {"perplexity_tokens": 2048, "perplexity_window": 1024}
    return Comparison(parameters | {"systems": SYSTEMS}, samples, dict.fromkeys(SYSTEMS, True))


def a_record() -> dict[str, Any]:
    compared = comparison()
    facts = dict.fromkeys(("commit", "date", "machine", "versions", "command"))
    parts = {"parameters": compared.parameters, "samples": compared.samples, "summary": summary(compared)}
    return {"schema": 1, "tool": "peers"} | facts | parts


def test_the_page_of_a_comparison() -> None:
    section = page.section("peers-m", a_record())
    for expected in (
        "greedy and without drafts",
        "a plain sequential read got 1.25 GB/s from the disk (0.50 to 2.00)",
        "| flashrt | int4 | 23.0 (22.0 to 24.0) | 25.0 (20.0 to 30.0) | 5.00 (4.00 to 6.00) | yes |",
        "| peer | Q4 | 17.0 (12.0 to 22.0) | 1.00 | killed | yes |",
        "| 0.5 GiB | peer | 2 | killed after 9.0 s | – | – | – | – |",
        "| 1 GiB | flashrt | 2 × 12 | 1.25 s | 2 MB | 2 MB | 3 MiB | 2 MiB |",
        "| peer | 50.0 | 2.00× |",
        "| flashrt int4 | 2.200 | +10.00% |",
    ):
        assert expected in section


def test_a_peer_is_taken_at_its_best() -> None:
    """The best of a peer's ways to run is another one under another cap, and both are told."""
    section = page.section("peers-m", a_record())
    for expected in (
        "flashrt over peer with the flags that are best for it: 1.5× without a limit (1 to 2, beside peer), "
        "5.5× at 1 GiB (5 to 6, beside peer --flag), 2.5× at 0.5 GiB (2 to 3, beside peer --flag).",
        "| peer | 1.50× (1.00× to 2.00×) | 25.0× (20.0× to 30.0×) | – |",
        "| peer --flag | 2.50× (2.00× to 3.00×) | 5.50× (5.00× to 6.00×) | 2.50× (2.00× to 3.00×) |",
        "| **peer, its best** | 1.50× (1.00× to 2.00×) | 5.50× (5.00× to 6.00×) | 2.50× (2.00× to 3.00×) |",
    ):
        assert expected in section


def test_the_plot(tmp_path: Path) -> None:
    caps, found = curves(a_record())
    assert caps == ["no limit", "1 GiB", "0.5 GiB"]
    assert list(found) == ["flashrt (int4)", "peer (Q4)", "peer --flag (Q4)", "slow (bf16)"]
    assert [spread and spread["median"] for spread in found["peer (Q4)"]] == [17.0, 1.0, None]
    draw(a_record(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_draws_the_plots(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "peers-m.json").write_text(record.dumps(a_record()))
    page.main(["--docs", str(tmp_path), "--plots"])
    assert (tmp_path / "benchmarks" / "peers-m.png").read_bytes().startswith(b"\x89PNG")


def test_a_whole_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every system under every cap, who goes first changing; what comes to nothing is not tried a third time."""
    order: list[str] = []

    def measure(system: Any, job: Job) -> dict[str, Any]:
        order.append(f"{system.name} {job.cap}{' warm' if job.warm else ''}")
        return ran(None if system.name == "llama.cpp" and job.cap == "1" else 2.0) | {"token_ids": [1]}

    pack = tiny_pack(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("the thing and the ring are in the inn. " * 20)
    monkeypatch.setattr(compare, "TEXTS", [text])
    monkeypatch.setattr(compare, "measure", measure)
    monkeypatch.setattr(compare, "chosen", lambda args: {n: Words(n) for n in args.systems})
    given = ["--packs", str(pack), "--gguf", str(text), "--checkpoint", str(pack), "--caps", "none", "1"]
    given += ["--systems", "flashrt", "llama.cpp", "--repeat", "3", "--prefill-tokens", "5", "--no-perplexity"]
    compare.main([*given, "--out", str(tmp_path / "out.json")])
    found = record.load(tmp_path / "out.json")
    assert order[:6] == [
        *("flashrt none", "llama.cpp none", "flashrt 1", "llama.cpp 1", "flashrt none warm", "llama.cpp none warm")
    ]
    assert order[6:9] == ["llama.cpp none", "flashrt none", "llama.cpp 1"]
    assert order.count("llama.cpp 1") == 2
    assert order.count("flashrt 1") == 3
    assert found["parameters"]["systems"] == {"flashrt": "w", "llama.cpp": "w"}
    assert found["summary"]["outputs"]["flashrt"]["same"]
    assert "| llama.cpp | w | 2.00 | killed | yes |" in page.section("peers", found)


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
    command = system.command(job(tmp_path, cap="0.8"))
    assert command[-2:] == ["--budget-gb", "0.8"]
    assert command[command.index("--speculate") + 1] == "off", "the page says without drafts"
    assert "--budget-gb" not in system.command(job(tmp_path))
    report = {"prompt_tokens": 3, "token_ids": [7], "ttft_s": 0.5, "decode_s": 2.0, "decode_tok_per_s": 4.0}
    figures = system.figures(json.dumps(report | {"bytes_read_per_token": 0.0}), wall_s=4.0)
    assert (figures["load_s"], figures["first_token_s"], figures["prefill_s"]) == (1.5, 2.0, 0.5)


def test_every_peer_can_be_started(tmp_path: Path) -> None:
    found = peers(tmp_path, Path("model-q4_k_m.gguf"), Path("model"), tmp_path)
    assert set(found) | {"flashrt"} == set(compare.SYSTEMS)
    assert found["llama.cpp"].weights == "Q4_K_M"
    for peer in found.values():
        assert peer.runner.exists()
        assert str(peer.model) in peer.command(job(tmp_path))
        assert "a.txt" in peer.score_commands(Score([Path("a.txt")], 8, 4, 1))[0]


def test_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "tools.benchmarks.peers", "--help"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0
    assert b"cold page cache" in done.stdout
