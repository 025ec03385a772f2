"""What every command does when nothing is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import flashrt
from flashrt.cli.options import DtypeName
from flashrt.storage.names import AUTO, DTYPE_NAMES
from flashrt_kernels.rows import DTYPES
from tests.cli.conftest import Cli, Result
from tests.families import tiny_checkpoint

REPORT = {
    "text",
    "token_ids",
    "prompt_tokens",
    "new_tokens",
    "ttft_s",
    "decode_tok_per_s",
    "peak_rss_bytes",
    "budget_bytes",
    "bytes_read_total",
    "bytes_read_per_token",
    "io_wait_s",
    "compute_s",
    "disk_roofline_share",
    "plan",
}


def parsed(result: Result) -> Any:
    """The one line of JSON on stdout."""
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def test_run_streams_text_and_closes_with_figures(cli: Cli, pack: Path) -> None:
    result = cli("run", pack, "--prompt", "hello", "--max-new-tokens", 12, "--ignore-eos")
    assert result.returncode == 0
    assert re.fullmatch(
        r"\[12 tokens, .* tokens/s( · .* tokens per pass)? · first after .* · peak memory .* of .*\]\n", result.stderr
    )
    assert len(result.stdout) > 1


def test_run_json_is_the_only_line_and_agrees_with_the_text(cli: Cli, pack: Path) -> None:
    arguments = ("run", pack, "--prompt", "hello", "--max-new-tokens", 12, "--ignore-eos")
    report = parsed(cli(*arguments, "--json"))
    assert set(report) >= REPORT
    assert report["new_tokens"] == len(report["token_ids"]) == 12
    assert report["plan"]["context"] == report["prompt_tokens"] + 12  # no memory for tokens that cannot come
    assert report["peak_rss_bytes"] <= report["budget_bytes"]
    assert cli(*arguments).stdout == report["text"] + "\n"


def test_run_takes_its_prompt_from_a_file_or_stdin(cli: Cli, pack: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("some words")
    options = ("--max-new-tokens", 5)
    expected = cli("run", pack, "--prompt", "some words", *options).stdout
    assert cli("run", pack, "--prompt-file", tmp_path / "prompt.txt", *options).stdout == expected
    assert cli("run", pack, "--prompt-file", "-", *options, stdin="some words").stdout == expected
    assert cli("run", pack, *options, stdin="some words").stdout == expected


def test_run_samples_reproducibly(cli: Cli, pack: Path) -> None:
    arguments = ("run", pack, "--prompt", "hello", "-n", 20, "--temperature", 1.5, "--top-k", 50, "--min-p", 0.01)
    first = cli(*arguments, "--seed", 1, "--json")
    assert parsed(cli(*arguments, "--seed", 1, "--json"))["token_ids"] == parsed(first)["token_ids"]
    assert parsed(cli(*arguments, "--seed", 2, "--json"))["token_ids"] != parsed(first)["token_ids"]


def test_run_stops_at_a_stop_string(cli: Cli, pack: Path) -> None:
    arguments = ("run", pack, "--prompt", "hello", "-n", 40, "--ignore-eos", "--json")
    text = parsed(cli(*arguments))["text"]
    stop = text[10:13]
    report = parsed(cli(*arguments, "--stop", "never this", "--stop", stop))
    assert report["finish_reason"] == "stop"
    assert report["text"] == text[: text.index(stop)]


def test_plan_owns_every_byte_and_its_smallest_budget_runs(cli: Cli, pack: Path) -> None:
    plan = parsed(cli("plan", pack, "--budget-gb", 1, "--context", 128, "--json"))
    assert sum(plan["owners"].values()) == plan["budget_bytes"] == 1 << 30
    assert plan["resident_share"] == 1
    table = cli("plan", pack, "--budget-gb", 1, "--context", 128).stdout
    for owner in plan["owners"]:
        assert owner in table
    smallest = re.search(r"--budget-gb (\d+\.\d+)", table)
    assert smallest is not None
    arguments = ("run", pack, "--prompt", "a", "-n", 2, "--context", 128, "--json", "--budget-gb")
    # Two runs of one program differ by some pages.
    report = parsed(cli(*arguments, float(smallest[1]) + 0.002))
    assert report["peak_rss_bytes"] <= report["budget_bytes"]
    refused = cli(*arguments, float(smallest[1]) * 0.85)
    assert refused.returncode == 1
    assert "the smallest that would do" in refused.stderr


def test_eval(cli: Cli, pack: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a line of some text\n" * 40)
    result = parsed(cli("eval", "ppl", pack, "--text-file", text, "--ctx", 64, "--max-tokens", 200, "--json"))
    assert result["ppl"] > 1
    assert 150 < result["tokens"] <= 200
    assert result["plan"]["budget_bytes"] >= result["peak_rss_bytes"]
    line = cli("eval", "ppl", pack, "--text-file", text, "--ctx", 64, "--max-tokens", 200).stdout
    assert line.startswith(f"perplexity {result['ppl']:.4f} over {result['tokens']} tokens")


def test_bench(cli: Cli, pack: Path) -> None:
    arguments = ("bench", pack, "--prompt-tokens", 8, "--prompt-tokens", 32, "--new-tokens", 4, "--repeat", 2)
    result = parsed(cli(*arguments, "--json"))
    assert set(result["prefill_tok_per_s"]) == {"8", "32"}
    assert result["decode_tok_per_s"] > 0
    assert result["bytes_read_per_token"] == 0
    assert result["threads"] >= 1
    assert "decode" in cli(*arguments).stdout


def test_inspect_and_verify(cli: Cli, pack: Path) -> None:
    facts = parsed(cli("inspect", pack, "--json"))
    assert (facts["family"], facts["dtype"], facts["layers"], facts["context"]) == ("llama", "int8", 3, 256)
    assert facts["kv_bytes_per_token"] == 3 * 2 * facts["kv_heads"] * facts["head_dim"] * 2
    assert facts["bytes"] == sum((pack / name).stat().st_size for name in facts["files"])
    assert "tiny-llama (llama)" in cli("inspect", pack).stdout
    assert parsed(cli("verify", pack, "--json"))["intact"]
    assert "is intact" in cli("verify", pack).stdout


def test_heads_that_differ_by_layer_are_told(cli: Cli, tmp_path: Path) -> None:
    _, checkpoint = tiny_checkpoint("gemma4", tmp_path / "checkpoint")
    assert cli("pack", checkpoint, tmp_path / "pack", "--dtype", "int8").returncode == 0
    shown = cli("inspect", tmp_path / "pack").stdout
    assert "6 heads, 3 KV heads of 20; 6 heads, 1 KV heads of 36" in shown
    refused = cli("calibrate", tmp_path / "pack", "--kv")
    assert refused.returncode != 0
    assert "heads that are rotated in part cannot have labels" in " ".join(refused.stderr.replace("│", " ").split())


def test_doctor_measures_and_remembers(cli: Cli, tmp_path: Path, pack: Path) -> None:
    facts = parsed(cli("doctor", "--dir", pack.parent, "--cache-dir", tmp_path, "--json"))
    assert facts["usable_cores"] >= 1
    assert facts["disk"]["best_bytes_per_s"] > 0
    assert Path(facts["profile"]).parent == tmp_path
    plan = parsed(cli("plan", pack, "--cache-dir", tmp_path, "--json"))
    assert plan["disk_bytes_per_s"] == pytest.approx(facts["disk"]["best_bytes_per_s"])


def test_chat_reads_lines_and_keeps_the_conversation(cli: Cli, pack: Path) -> None:
    options = ("--temperature", 0, "--max-new-tokens", 8)
    result = cli("chat", pack, *options, "--stats", stdin="hello\n\nmore\n/reset\nhello\n/exit\nnever\n")
    assert result.returncode == 0, result.stderr
    # An answer may hold line breaks: compare whole texts, by way of the same messages asked one at a time.
    first = cli("run", pack, "--prompt", "hello", "-n", 8).stdout
    assert result.stdout.startswith(first)
    assert result.stdout.endswith(first)
    assert len(result.stdout) > 2 * len(first)
    assert result.stderr.count("tokens/s") == 3
    assert "[started over]" in result.stderr


def test_chat_says_when_the_context_is_full(cli: Cli, pack: Path) -> None:
    result = cli("chat", pack, "--temperature", 0, "--context", 40, stdin="hello\n")
    assert result.returncode == 0
    assert "the context is full" in result.stderr or "[" not in result.stderr  # or it stopped by itself
    result = cli("chat", pack, "--context", 20, stdin="a message that is longer than that\n")
    assert result.returncode == 2
    assert "larger --context" in result.stderr


def test_help_shows_an_example_of_every_command(cli: Cli) -> None:
    top = cli("--help").stdout
    for command in (
        "pull",
        "pack",
        "plan",
        "run",
        "chat",
        "bench",
        "models",
        "remove",
        "inspect",
        "verify",
        "doctor",
        "eval ppl",
        "eval retrieval",
    ):
        text = cli(*command.split(), "--help").stdout
        assert f"Example: flashrt {command}" in text
        assert command.split()[0] in top
    assert cli("--version").stdout == f"flashrt {flashrt.__version__}\n"


def test_version_is_the_project_s() -> None:
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'version = "{flashrt.__version__}"' in pyproject


def test_python_api(pack: Path, cache_home: Path) -> None:
    with flashrt.load(pack, context=64, cache_dir=cache_home) as engine:
        generation = engine.generate("hello", max_new_tokens=6, ignore_eos=True)
        text = "".join(token.text for token in generation)
        assert generation.report.text == text
        assert generation.report.new_tokens == 6
        again = engine.generate("hello", max_new_tokens=6, ignore_eos=True)
        assert [token.id for token in again] == generation.report.token_ids
    with pytest.raises(flashrt.errors.UsageError, match="budget"):
        flashrt.load(pack, budget_gb=0)
    with pytest.raises(flashrt.errors.UsageError, match="at most 256"):
        flashrt.load(pack, context=257)


def test_the_names_of_dtypes_agree() -> None:
    """They stand where nothing may be imported, where options are declared, and where they are encoded."""
    assert (AUTO, *(codec.value for codec in DTYPES)) == DTYPE_NAMES == tuple(name.value for name in DtypeName)
