"""docs/benchmarks.md: what the records say, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools.benchmarks import page
from tools.benchmarks.harness import record
from tools.benchmarks.harness.samples import spread, table

ROOT = Path(__file__).parents[3]


def test_the_page_is_what_the_records_give() -> None:
    written = (ROOT / "docs" / "benchmarks.md").read_text()
    assert written == page.page(ROOT / "docs" / "benchmarks"), "run `make benchmarks-page`"


def toy(tool: str = "toy", **changes: Any) -> dict[str, Any]:
    columns = ["name|of", ("cap", "budget"), ("speed", "number"), ("peak", "bytes"), ("loss", "change")]
    rows = [
        ["a", "none", spread([3.0, 1.0, 2.0]), spread([2 << 20]), -0.0123],
        ["b", "0.5", "killed", None, 0.5],
        ["c", "1", spread([1.0, 0.25]) | {"note": "timeout"}, spread([3 << 20, 3 << 20]), None],
    ]
    return {
        "schema": 1,
        "tool": tool,
        "commit": {"hash": "0123456789", "dirty": False},
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "CPU", "cores": 2, "isa": "avx2", "memory_bytes": 24 << 30, "platform": "P"},
        "versions": {"flashrt": "0.1.0"},
        "command": "python -m tools.benchmarks.toy --caps none",
        "parameters": {},
        "samples": [],
        "summary": {"text": ["About it."], "tables": [table(columns, rows)]},
    } | changes


def test_tables() -> None:
    assert page.section("toy-m", toy()).splitlines() == [
        "## toy-m",
        "",
        "About it.",
        "",
        "| name\\|of | cap | speed | peak | loss |",
        "| --- | --- | --- | --- | --- |",
        "| a | no limit | 2.00 (1.00 to 3.00) | 2 MiB | -1.23% |",
        "| b | 0.5 GiB | killed | – | +50.00% |",
        "| c | 1 GiB | 0.625 (0.250 to 1.00) (timeout) | 3 MiB | – |",
        "",
        "From [toy-m.json](benchmarks/toy-m.json); `python -m tools.benchmarks.toy --caps none`; commit 0123456; "
        "2026-01-02T03:04:05+00:00; CPU, avx2, 2 cores, 24.0 GiB of memory, P; flashrt 0.1.0.",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"commit": {"hash": "0123456789", "dirty": True}}, "; commit 0123456 with changes;"),
        (
            {"commit": None, "date": None, "recorded": {"commit": "abcdef0123", "date": "2026-02-03T00:00:00+00:00"}},
            "; of a build not noted, recorded by commit abcdef0 on 2026-02-03; CPU",
        ),
        ({"commit": None}, "; of a build not noted; 2026"),
    ],
)
def test_what_was_measured(changes: dict[str, Any], expected: str) -> None:
    assert expected in page.section("toy", toy(**changes))


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (0.5, "share", "50%"),
        (0.123, "permille", "12.3%"),
        (1e8, "MB/s", "100 MB/s"),
        (0.00151, "ms", "1.51"),
        (64.0, "ratio", "64.0×"),
        (3072, "KiB", "3 KiB"),
        (12345.6, "number", "12,346"),
        (2.26388, "ppl", "2.264"),
        (spread([1.0, 2.0]), "s", "1.50 s (1.00 to 2.00)"),
        (spread([0.2, 0.4]), "share", "30% (20% to 40%)"),
    ],
)
def test_units(value: Any, unit: str, expected: str) -> None:
    assert page.cell(value, unit) == expected


def test_peers_come_first(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name, tool in (("a", "toy"), ("z", "peers")):
        (folder / f"{name}.json").write_text(record.dumps(toy(tool)))
    page.main(["--docs", str(tmp_path)])
    written = (tmp_path / "benchmarks.md").read_text()
    assert written.index("## z") < written.index("## a")
    assert "![Tokens per second against the memory cap](benchmarks/z.png)" in written
    assert "benchmarks/a.png" not in written
