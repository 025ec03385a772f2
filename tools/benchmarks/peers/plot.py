"""Tokens per second of every system against the memory cap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLOOR = 0.5  # where killed runs are marked: this much of the slowest figure


def curves(record: dict[str, Any]) -> tuple[list[str], dict[str, list[dict[str, float] | None]]]:
    """The caps, from none to the least, and by system the spread under each; None: killed, or no token."""
    speeds = record["summary"]["tables"][0]
    caps = [column["name"] for column in speeds["columns"][2:-1]]
    order = sorted(range(len(caps)), key=lambda at: -memory(caps[at]))
    found = {}
    for system, weights, *cells, _ in speeds["rows"]:
        spreads = [cell if isinstance(cell, dict) else None for cell in cells]
        found[f"{system} ({weights})"] = [spreads[at] for at in order]
    return [caps[at] for at in order], found


def memory(cap: str) -> float:
    return float("inf") if cap == "no limit" else float(cap.split()[0])


def draw(record: dict[str, Any], path: Path) -> None:
    """A line per system over the caps, with ranges; what was killed or never gave a token is a cross."""
    from matplotlib.figure import Figure

    caps, found = curves(record)
    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    floor = FLOOR * min(spread["least"] for spreads in found.values() for spread in spreads if spread)
    for i, (label, spreads) in enumerate(found.items()):
        beside = (i - len(found) / 2) * 0.04  # crosses of several systems would cover each other
        at, middle, below, above = zip(*points(spreads), strict=True) if any(spreads) else ([], [], [], [])
        line = axes.errorbar(at, middle, yerr=(below, above), fmt="o-", capsize=3, label=label)[0]
        lost = [place + beside for place, spread in enumerate(spreads) if not spread]
        axes.plot(lost, [floor] * len(lost), "x", color=line.get_color(), markersize=8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(caps)), caps)
    axes.set_xlabel("memory of the process, page cache included")
    axes.set_ylabel("tokens/s, median and range (× killed or no token in time)")
    axes.set_title(record["parameters"]["model"])
    axes.grid(True, which="both", alpha=0.25)
    figure.legend(fontsize="small", loc="outside right upper")  # beside the lines, not over them
    figure.savefig(path, metadata={"Software": None})


def points(spreads: list[dict[str, float] | None]) -> Iterator[tuple[int, float, float, float]]:
    """Place, median, and how far the range goes below and above it, of those that gave a token."""
    for at, spread in enumerate(spreads):
        if spread:
            yield at, spread["median"], spread["median"] - spread["least"], spread["most"] - spread["median"]
