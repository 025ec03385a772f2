"""From runs to the figures that are kept: medians per system and cap, and ratios of runs made side by side."""

from __future__ import annotations

import statistics
from typing import Any

Runs = dict[str, dict[str, list[dict[str, Any]]]]  # by system and cap

FIGURES = (
    "decode_tok_per_s",
    "first_token_s",
    "load_s",
    "prefill_s",
    "prefill_tok_per_s",
    "bytes_read_per_token",
    "read_bytes",
    "wall_s",
    "cgroup_peak_bytes",
    "peak_rss_bytes",
)
SPREAD = ("decode_tok_per_s", "prefill_tok_per_s", "first_token_s")  # kept run by run, too


def cell(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of the runs of one system under one cap. Figures are medians of those that gave a token."""
    status = statistics.mode(run["status"] for run in runs)
    good = [run for run in runs if "first_token_s" in run]
    result: dict[str, Any] = {"status": status, "runs": len(runs)}
    if not good:
        return result | {"wall_s": statistics.median(run["wall_s"] for run in runs), **_said(runs)}
    result["new_tokens"] = min(len(run["token_ids"]) for run in good)
    for name in FIGURES:
        values = [run[name] for run in good if run[name] is not None]
        result[name] = statistics.median(values) if values else None
    return result | {f"{name}_all": [run[name] for run in good] for name in SPREAD}


def _said(runs: list[dict[str, Any]]) -> dict[str, str]:
    """The last line of a program that ended by itself."""
    said = [run["message"].splitlines()[-1] for run in runs if run["status"] == "failed" and run["message"]]
    return {"message": said[-1]} if said else {}


def cells(by_cap: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {cap: cell(runs) for cap, runs in by_cap.items()}


def ratios(runs: Runs, figure: str, base: str = "flashrt") -> dict[str, dict[str, float]]:
    """By cap and system: how many times the system's figure `base` has, the median over repetitions."""
    result: dict[str, dict[str, float]] = {}
    for name, by_cap in runs.items():
        for cap, others in by_cap.items():
            pairs = zip(runs.get(base, {}).get(cap, []), others, strict=False)
            found = [ours[figure] / theirs[figure] for ours, theirs in pairs if ours.get(figure) and theirs.get(figure)]
            if name != base and found:
                result.setdefault(cap, {})[name] = statistics.median(found)
    return result
