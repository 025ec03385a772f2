#!/usr/bin/env python3
"""Write docs/benchmarks.md from the records in docs/benchmarks: every table from a recorded run, none by hand.

    python -m tools.benchmarks.page            # or, with the plots: make benchmarks-page

The same records give the same page. A record brings its own text and tables (see tools.benchmarks.harness.record);
what is known here is how a figure of each unit is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.benchmarks.harness import facts, record

DOCS = facts.ROOT / "docs"
FIRST = "peers"  # whose records come first
NOTHING = "–"
INTRODUCTION = """\
# Benchmarks

Made by `make benchmarks-page` from the records in [benchmarks](benchmarks); a test holds the page to them. Figures of
several runs are medians, the range in brackets beside them. Disks of shared machines wander by a factor of two within
the hour: trust ratios within one table, whose systems took turns, before figures of two."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--plots", action="store_true", help="draw the plots, too; needs matplotlib")
    args = parser.parse_args(arguments)
    (args.docs / "benchmarks.md").write_text(page(args.docs / "benchmarks"))
    if args.plots:
        from tools.benchmarks.peers.plot import draw

        for name, found in records(args.docs / "benchmarks"):
            if found["tool"] == "peers":
                draw(found, args.docs / "benchmarks" / f"{name}.png")


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records, comparisons with peers first, then by name."""
    found = {path.stem: record.load(path) for path in folder.glob("*.json")}
    yield from sorted(found.items(), key=lambda item: (item[1]["tool"] != FIRST, item[0]))


def page(folder: Path) -> str:
    return "\n\n".join([INTRODUCTION, *(section(name, found) for name, found in records(folder))]) + "\n"


def section(name: str, found: dict[str, Any]) -> str:
    summary = found["summary"]
    plot = [f"![Tokens per second against the memory cap](benchmarks/{name}.png)"] if found["tool"] == "peers" else []
    tables = [table(entry) for entry in summary["tables"]]
    return "\n\n".join([f"## {name}", *summary.get("text", []), *plot, *tables, source(name, found)])


def table(found: dict[str, Any]) -> str:
    columns = found["columns"]
    lines: Iterable[Iterable[str]] = [
        [column["name"] for column in columns],
        ["---"] * len(columns),
        *([cell(value, c["unit"]) for value, c in zip(row, columns, strict=True)] for row in found["rows"]),
    ]
    return "\n".join("| " + " | ".join(words.replace("|", "\\|") for words in line) + " |" for line in lines)


def cell(value: Any, unit: str) -> str:
    """A word, a figure, or a spread: its median, with the range where there are several."""
    if value is None:
        return NOTHING
    if not isinstance(value, dict):
        return quantity(value, unit)
    words = quantity(value["median"], unit)
    if value["count"] > 1:
        least, most = (quantity(value[end], unit, bare=True) for end in ("least", "most"))
        words += f" ({least} to {most})" if least != most else ""
    return words + (f" ({value['note']})" if "note" in value else "")


def quantity(value: Any, unit: str, bare: bool = False) -> str:
    """A figure of a unit; `bare`: without the unit's name, which stands beside it already."""
    if unit == "budget":
        return "no limit" if value == "none" else f"{value} GiB"
    if isinstance(value, str) or not unit:
        return str(value)
    factor, digits, name = UNITS[unit]
    return digits(value * factor) + ("" if bare and name.startswith(" ") else name)


def number(value: float) -> str:
    """Three digits of a measurement, all of a count."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:#.3g}"


def whole(value: float) -> str:
    return f"{value:,.0f}"


# Unit → what to multiply by, how to write that, and the name after it.
UNITS: dict[str, tuple[float, Callable[[float], str], str]] = {
    "number": (1, number, ""),
    "s": (1, number, " s"),
    "ms": (1e3, number, ""),
    "µs": (1e6, number, ""),
    "ratio": (1, number, "×"),
    "share": (100, whole, "%"),
    "permille": (100, lambda value: f"{value:.1f}", "%"),
    "change": (100, lambda value: f"{value:+.2f}", "%"),
    "ppl": (1, lambda value: f"{value:.3f}", ""),
    "bytes": (2**-20, whole, " MiB"),
    "KiB": (2**-10, whole, " KiB"),
    "kB": (1e-3, whole, " kB"),
    "MB": (1e-6, whole, " MB"),
    "MB/s": (1e-6, whole, " MB/s"),
}


def source(name: str, found: dict[str, Any]) -> str:
    """Where the figures of a section come from."""
    words = [f"From [{name}.json](benchmarks/{name}.json)"]
    if found["command"]:
        words.append(f"`{found['command']}`")
    words.append(build(found))
    if found["date"]:
        words.append(found["date"])
    if found["machine"]:
        words.append(described(found["machine"]))
    if found["versions"]:
        words.append(", ".join(f"{package} {version}" for package, version in found["versions"].items()))
    return "; ".join(words) + "."


def build(found: dict[str, Any]) -> str:
    """The commit that was measured; of a record that does not know it, the one that brought the record."""
    if commit := found["commit"]:
        return f"commit {commit['hash'][:7]}{' with changes' if commit['dirty'] else ''}"
    if added := found.get("recorded"):
        return f"of a build not noted, recorded by commit {added['commit'][:7]} on {added['date'][:10]}"
    return "of a build not noted"


def described(machine: dict[str, Any]) -> str:
    words = [machine[key] for key in ("cpu", "isa") if machine.get(key)]
    if machine.get("cores"):
        words.append(f"{machine['cores']} cores")
    if machine.get("memory_bytes"):
        words.append(f"{machine['memory_bytes'] / 2**30:.1f} GiB of memory")
    return ", ".join([*words, *([machine["platform"]] if machine.get("platform") else [])])


if __name__ == "__main__":
    main()
