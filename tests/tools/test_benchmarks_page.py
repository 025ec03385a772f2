"""docs/benchmarks.md: what the recorded files say, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tools import benchmarks_page

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_files_give() -> None:
    written = (ROOT / "docs" / "benchmarks.md").read_text()
    assert written == benchmarks_page.page(ROOT / "docs" / "benchmarks"), "run `make benchmarks-page`"


def comparison() -> dict[str, Any]:
    ran = {
        "status": "ok",
        "runs": 5,
        "new_tokens": 12,
        "first_token_s": 1.25,
        "decode_tok_per_s": 8.0,
        "prefill_tok_per_s": 100.0,
        "bytes_read_per_token": 2e6,
        "read_bytes": 3e6,
        "cgroup_peak_bytes": 3 << 20,
        "peak_rss_bytes": 2 << 20,
    }
    killed = {"status": "killed", "runs": 2, "wall_s": 7.0}
    slow = ran | {"status": "timeout", "decode_tok_per_s": 0.125}
    about = {"weights": "int4", "output": "x", "same_tokens": True}
    disk = {"plain_median": 1e9, "plain_least": 5e8, "plain_most": 2e9, "several_median": 1.5e9}
    return {
        "tool": "bench_peers",
        "command": "python -m tools.bench_peers --caps none 1",
        "date": "2026-01-02",
        "machine": {"cpu": "CPU", "cores": 2, "memory_bytes": 24 << 30, "platform": "P", "disk_bytes_per_s": disk},
        "versions": {"flashrt": "0.1.0"},
        "model": "m",
        "prompt": "def f(",
        "repeat": 5,
        "seconds": 60.0,
        "systems": {"flashrt": about, "peer": about | {"weights": "bf16"}},
        "decode": {"flashrt": {"none": ran, "1": ran}, "peer": {"none": slow, "1": killed}},
        "prefill": {"flashrt": ran, "peer": ran},
        "prefill_tokens": 512,
        "flashrt_over": {"none": {"peer": 64.0}},
        "flashrt_over_prefill": {"none": {"peer": 1.0}},
        "perplexity": {
            "tokens": 2048,
            "window": 1024,
            "systems": {"flashrt int4": {"t": {"ppl": 2.2}}, "transformers bf16": {"t": {"ppl": 2.0}}},
        },
    }


def test_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "peers-m.json").write_text(json.dumps(comparison()))
    page = benchmarks_page.page(tmp_path)
    for expected in (
        "| flashrt | int4 | 8.00 | 8.00 | yes |",
        "| peer | bf16 | 0.125 (timeout) | killed | yes |",
        "| peer | 64.0× | – |",
        "| 1 GiB | peer | 2 | killed after 7.00 s | – | – | – | – |",
        "| 1 GiB | flashrt | 5 × 12 | 1.25 s | 2 MB | 3 MB | 3 MiB | 2 MiB |",
        "| flashrt int4 | 2.200 (+10.00%) |",
        "![Tokens per second against the memory cap](benchmarks/peers-m.png)",
        "0.50 to 2.00",
        "`python -m tools.bench_peers --caps none 1`; 2026-01-02; CPU, 2 cores",
    ):
        assert expected in page


def test_files_of_no_known_kind(tmp_path: Path) -> None:
    data = {
        "isa": "avx512",
        "read_gb_per_s": 33.81,
        "narrow": {"linear.int4.1": {"gb_per_s": 12.0, "share": 0.5}, "glu.int4.1": {"gb_per_s": 9.25, "share": None}},
        "wide": {"gemm|f32": 512.5},
        "engines": [{"engine": "uring", "bytes_per_s": 2e9, "size_bytes": 1 << 21}],
        "nested": {"deeper": {"all": [1, 2, 3]}},
    }
    (tmp_path / "ops.json").write_text(json.dumps(data))
    page = benchmarks_page.page(tmp_path)
    for expected in (
        "| read_gb_per_s | 33.8 |",
        "| narrow | gb_per_s | share |",
        "| glu.int4.1 | 9.25 | – |",
        "| gemm\\|f32 | 512 |",
        "| 1 | uring | 2.00 GB/s | 2 MiB |",
    ):
        assert expected in page


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from tools.peers.plot import draw

    draw(comparison(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_it_needs_nothing_but_python(tmp_path: Path) -> None:
    """The peers' environments, which have matplotlib, do not have flashrt."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "peers-m.json").write_text(json.dumps(comparison()))
    program = "import sys; sys.modules['flashrt'] = None; sys.argv = ['page', '--docs', sys.argv[1]]; "
    program += "from tools.benchmarks_page import main; main()"
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True)
    assert (tmp_path / "benchmarks.md").read_text() == benchmarks_page.page(tmp_path / "benchmarks")
