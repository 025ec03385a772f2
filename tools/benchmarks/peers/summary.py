"""What a comparison with peers comes to: tables of spreads per system and cap, and ratios of runs side by side."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tools.benchmarks.harness.samples import Sample, median, only, ratios, spread, table
from tools.benchmarks.quality import perplexity_table

OURS = "flashrt"
DETAILS = {
    "first_token_s": ("first token", "s"),
    "bytes_read_per_token": ("read per token", "MB"),
    "read_bytes": ("read in all", "MB"),
    "cgroup_peak_bytes": ("peak, page cache included", "bytes"),
    "peak_rss_bytes": ("peak RSS", "bytes"),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Settings, samples, and by system whether it wrote the same tokens every time."""

    parameters: dict[str, Any]
    samples: list[Sample]
    same: dict[str, bool]

    def cell(self, system: str, cap: str, phase: str = "decode") -> list[Sample]:
        return only(self.samples, phase=phase, system=system, cap=cap)


def summary(compared: Comparison) -> dict[str, Any]:
    """The text and the tables: speeds, flashrt over the others, details, prefill, perplexity."""
    tables = [speeds(compared), over(compared), details(compared)]
    if only(compared.samples, phase="prefill"):
        tables.append(prefill(compared))
    if scored := only(compared.samples, phase="perplexity"):
        tables.append(
            perplexity_table(scored, *(compared.parameters[f"perplexity_{of}"] for of in ("tokens", "window")))
        )
    return {"text": text(compared), "tables": tables}


def text(compared: Comparison) -> list[str]:
    parameters = compared.parameters
    disk = only(compared.samples, phase="disk")
    plain = spread(s["disk_plain_bytes_per_s"] / 1e9 for s in disk)
    about = (
        f"{parameters['model']}, greedy and without drafts, `{parameters['prompt']}` continued by each system in a "
        "process of its own: in turn, in a memory cgroup of the size given, page cache cold, the same number of "
        "threads. Bytes read are the kernel's count for the process, page faults included. *Killed*: by the kernel, "
        f"for memory. *Timeout*: not done in {parameters['seconds']:g} s; what was reached is given. What comes to "
        "nothing twice is not tried again."
    )
    if plain:
        about += (
            f" Meanwhile a plain sequential read got {plain['median']:.2f} GB/s from the disk "
            f"({plain['least']:.2f} to {plain['most']:.2f})."
        )
    return [about, *headlines(compared)]


def headlines(compared: Comparison) -> Iterable[str]:
    """Each peer with several ways to run: flashrt over the best of them, by cap."""
    for peer, ways in families(compared).items():
        found = []
        for cap in compared.parameters["caps"]:
            best = best_of(compared, ways, cap)
            ratio = spread(against(compared, best, cap)) if best else None
            if ratio:
                where = "without a limit" if cap == "none" else f"at {cap} GiB"
                extent = f"{ratio['least']:.3g} to {ratio['most']:.3g}"
                found.append(f"{ratio['median']:.3g}× {where} ({extent}, beside {best})")
        if len(ways) > 1 and found:
            yield f"flashrt over {peer} with the flags that are best for it: {', '.join(found)}."


def families(compared: Comparison) -> dict[str, list[str]]:
    """Peer → the ways in which it runs: its name, with and without flags."""
    found: dict[str, list[str]] = {}
    for system in compared.parameters["systems"]:
        if system != OURS:
            found.setdefault(system.partition(" --")[0], []).append(system)
    return found


def best_of(compared: Comparison, ways: list[str], cap: str) -> str | None:
    """The fastest of a peer's ways under a cap; None where none gave a token."""
    speeds = {way: median(s.get("decode_tok_per_s") for s in compared.cell(way, cap)) for way in ways}
    return max((way for way in ways if speeds[way]), key=lambda way: speeds[way] or 0.0, default=None)


def against(compared: Comparison, other: str, cap: str, figure: str = "decode_tok_per_s") -> list[float]:
    phase = "decode" if figure == "decode_tok_per_s" else "prefill"
    return ratios(compared.cell(OURS, cap, phase), compared.cell(other, cap, phase), figure)


def speeds(compared: Comparison) -> dict[str, Any]:
    caps, systems = compared.parameters["caps"], compared.parameters["systems"]
    rows = [
        [
            system,
            weights,
            *(speed(compared.cell(system, cap)) for cap in caps),
            "yes" if compared.same[system] else "NO",
        ]
        for system, weights in systems.items()
    ]
    columns = ["tokens/s", "weights", *((cap_words(cap), "number") for cap in caps), "same tokens under all"]
    return table(columns, rows)


def over(compared: Comparison) -> dict[str, Any]:
    """flashrt's speed over that of each way of each peer, and over the best of a peer's ways."""
    caps = compared.parameters["caps"]
    rows = []
    for peer, ways in families(compared).items():
        rows += [[way, *(spread(against(compared, way, cap)) for cap in caps)] for way in ways]
        if len(ways) > 1:
            best = [best_of(compared, ways, cap) for cap in caps]
            found = [spread(against(compared, way, cap)) if way else None for way, cap in zip(best, caps, strict=True)]
            rows.append([f"**{peer}, its best**", *found])
    return table(["flashrt's tokens/s, over those of", *((cap_words(cap), "ratio") for cap in caps)], rows)


def details(compared: Comparison) -> dict[str, Any]:
    rows = []
    for cap in compared.parameters["caps"]:
        for system in compared.parameters["systems"]:
            runs = compared.cell(system, cap)
            if not runs:
                continue
            good = [run for run in runs if "first_token_s" in run]
            tokens = f" × {min(run['new_tokens'] for run in good)}" if good else ""
            figures = [spread(run[name] for run in good) for name in DETAILS]
            if not good:
                figures[0] = f"{status(runs)} after {median(run['wall_s'] for run in runs):.1f} s"
            rows.append([cap_words(cap), system, f"{len(runs)}{tokens}", *figures])
    return table(["memory", "system", "runs × tokens", *DETAILS.values()], rows)


def prefill(compared: Comparison) -> dict[str, Any]:
    rows = []
    for system in compared.parameters["systems"]:
        if runs := compared.cell(system, "none", "prefill"):
            beside = None if system == OURS else spread(against(compared, system, "none", "prefill_tok_per_s"))
            rows.append([system, speed(runs, "prefill_tok_per_s"), beside])
    title = f"prompt of {compared.parameters['prefill_tokens']} tokens, all in memory"
    return table([title, ("tokens/s", "number"), ("flashrt's, over it", "ratio")], rows)


def speed(runs: list[Sample], figure: str = "decode_tok_per_s") -> Any:
    """A spread, with what became of the runs where that was not their end; or that alone."""
    found, ended = spread(run.get(figure) for run in runs), status(runs) if runs else "not tried"
    if found is None:
        return ended
    return found if ended == "ok" else found | {"note": ended}


def status(runs: list[Sample]) -> str:
    return statistics.mode(run["status"] for run in runs)


def cap_words(cap: str) -> str:
    return "no limit" if cap == "none" else f"{cap} GiB"
