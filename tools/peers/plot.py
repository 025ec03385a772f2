"""Tokens per second of every system against the memory cap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FLOOR = 0.5  # where killed runs are marked: this much of the slowest figure


def draw(data: dict[str, Any], path: Path) -> None:
    """A line per system over the caps, from none to the least; what was killed or never gave a token is a cross."""
    from matplotlib.figure import Figure

    decode = data["decode"]
    caps = sorted(next(iter(decode.values())), key=lambda cap: -float("inf") if cap == "none" else -float(cap))
    figure = Figure(figsize=(10, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    speeds = {name: [cells[cap].get("decode_tok_per_s") for cap in caps] for name, cells in decode.items()}
    floor = FLOOR * min(speed for found in speeds.values() for speed in found if speed)
    for i, (name, found) in enumerate(speeds.items()):
        label = f"{name} ({data['systems'][name]['weights']})"
        line = axes.plot(range(len(caps)), [speed or float("nan") for speed in found], "o-", label=label)[0]
        lost = [at for at, speed in enumerate(found) if not speed]
        beside = (i - len(speeds) / 2) * 0.04  # crosses of several systems would cover each other
        axes.plot([at + beside for at in lost], [floor] * len(lost), "x", color=line.get_color(), markersize=8)
    axes.set_yscale("log")
    axes.set_xticks(range(len(caps)), ["no limit" if cap == "none" else f"{cap} GiB" for cap in caps])
    axes.set_xlabel("memory of the process, page cache included")
    axes.set_ylabel("tokens/s (× killed or no token in time)")
    axes.set_title(data["model"])
    axes.grid(True, which="both", alpha=0.25)
    figure.legend(fontsize="small", loc="outside right upper")  # beside the lines, not over them
    figure.savefig(path, metadata={"Software": None})
