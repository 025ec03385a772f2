#!/usr/bin/env python3
"""Write docs/benchmarks.md from the JSON files in docs/benchmarks: every table from a recorded run, none by hand.

    python -m tools.benchmarks_page            # needs nothing but Python
    make benchmarks-page                       # the plots too, with the matplotlib of the peers' environment

The same files give the same page. A file says with "tool" what it holds; what is not known here becomes plain tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
NOTHING = "–"
INTRODUCTION = """\
# Benchmarks

Made by `make benchmarks-page` from the files in [benchmarks](benchmarks); a test holds the page to them. Figures of
several runs are medians. Disks of shared machines wander by a factor of two within the hour: trust ratios within one
table, whose systems took turns, before figures of two."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS)
    parser.add_argument("--plots", action="store_true", help="draw the plots, too; needs matplotlib")
    args = parser.parse_args()
    (args.docs / "benchmarks.md").write_text(page(args.docs / "benchmarks"))
    if args.plots:
        from tools.peers.plot import draw

        for name, data in recorded(args.docs / "benchmarks"):
            if data.get("tool") == "bench_peers":
                draw(data, args.docs / "benchmarks" / f"{name}.png")


def recorded(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files, comparisons with peers first, then by name."""
    files = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    yield from sorted(files.items(), key=lambda item: (item[1].get("tool") != "bench_peers", item[0]))


def page(folder: Path) -> str:
    sections = [section(name, data) for name, data in recorded(folder)]
    return "\n\n".join([INTRODUCTION, *sections]) + "\n"


def section(name: str, data: dict[str, Any]) -> str:
    renderers = {
        "ablation": ablation,
        "bench_peers": peers,
        "bench_budgets": budgets,
        "bench_experts": experts,
        "bench_io": io,
        "bench_sparse": sparse,
        "bench_speculation": speculation,
        "bench_verification": verification,
        "frontier": frontier,
        "quality": quality,
    }
    parts = renderers.get(data.get("tool", ""), anything)(name, data)
    return "\n\n".join([f"## {name}", *parts, source(name, data)])


def source(name: str, data: dict[str, Any]) -> str:
    """Where the tables of a section come from."""
    words = [f"From [{name}.json](benchmarks/{name}.json)"]
    if "command" in data:
        words.append(f"`{data['command']}`")
    if "date" in data:
        words.append(data["date"])
    if machine := data.get("machine"):
        words.append(described(machine))
    if isinstance(versions := data.get("versions"), dict):
        words.append(", ".join(f"{package} {version}" for package, version in versions.items()))
    return "; ".join(words) + "."


def described(machine: dict[str, Any]) -> str:
    words = [machine["cpu"]] if machine.get("cpu") else []
    words.append(f"{machine['cores']} cores")
    if "memory_bytes" in machine:
        words.append(f"{size(machine['memory_bytes'])} of memory")
    if disk := machine.get("disk_bytes_per_s"):
        least, most = disk["plain_least"] / 1e9, disk["plain_most"] / 1e9
        words.append(
            f"a disk that gave a plain sequential read {disk['plain_median'] / 1e9:.2f} GB/s meanwhile "
            f"({least:.2f} to {most:.2f}), several at once {disk['several_median'] / 1e9:.2f}"
        )
    words.append(machine["platform"])
    return ", ".join(words)


def peers(name: str, data: dict[str, Any]) -> Iterator[str]:
    """Tables of a comparison. Caps are columns where a figure is enough, rows where there are several."""
    systems, decode = data["systems"], data["decode"]
    caps = list(next(iter(decode.values())))
    yield (
        f"{data['model']}, greedy, `{data['prompt']}` continued by each system in a process of its own: "
        f"in turn, in a memory cgroup of the size given, page cache cold, "
        f"{data['machine']['cores']} threads. Bytes read are the kernel's count for the process, page faults included. "
        f"*Killed*: by the kernel, for memory. *Timeout*: not done in {number(data['seconds'])} s; what was reached is "
        f"given. What comes to nothing twice is not tried again."
    )
    yield f"![Tokens per second against the memory cap](benchmarks/{name}.png)"
    yield table(
        ["tokens/s", "weights", *map(cap_label, caps), "same tokens under all"],
        [
            [
                *(system, about["weights"]),
                *(speed(decode[system][cap]) for cap in caps),
                "yes" if about["same_tokens"] else "no",
            ]
            for system, about in systems.items()
        ],
    )
    if over := data["flashrt_over"]:
        others = [system for system in systems if any(system in found for found in over.values())]
        rows = [[other, *(times(over.get(cap, {}).get(other)) for cap in caps)] for other in others]
        yield table(["flashrt's tokens/s, over those of", *map(cap_label, caps)], rows)
    yield table(
        [
            "memory",
            "system",
            "runs × tokens",
            "first token",
            "read per token",
            "read in all",
            "peak, page cache included",
            "peak RSS",
        ],
        [[cap_label(cap), system, *(details(cells[cap]))] for cap in caps for system, cells in decode.items()],
    )
    if data["prefill"]:
        yield table(
            [f"prompt of {data['prefill_tokens']} tokens, all in memory", "tokens/s", "flashrt's, over it"],
            [
                [
                    system,
                    speed(cell, "prefill_tok_per_s"),
                    times(data["flashrt_over_prefill"].get("none", {}).get(system)),
                ]
                for system, cell in data["prefill"].items()
            ],
        )
    if scored := data["perplexity"]:
        yield perplexity(scored["systems"], scored["tokens"], scored["window"])


def details(cell: dict[str, Any]) -> list[str]:
    if "first_token_s" not in cell:
        return [str(cell["runs"]), f"{cell['status']} after {number(cell['wall_s'])} s", *[NOTHING] * 4]
    runs = f"{cell['runs']} × {cell['new_tokens']}"
    read = [megabytes(cell["bytes_read_per_token"]), megabytes(cell["read_bytes"])]
    peaks = [size(cell["cgroup_peak_bytes"]), size(cell["peak_rss_bytes"])]
    return [runs, f"{number(cell['first_token_s'])} s", *read, *peaks]


def speed(cell: dict[str, Any], figure: str = "decode_tok_per_s") -> str:
    found = cell.get(figure)
    if found is None:
        return str(cell["status"])
    return number(found) if cell["status"] == "ok" else f"{number(found)} ({cell['status']})"


def budgets(name: str, data: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{data['model']}, {data['dtype']}, {size(data['pack_bytes'])}: {data['new_tokens']} tokens, "
        f"runs of each: {data['repeat']}. The same tokens under every budget: {'yes' if data['same_tokens'] else 'no'}."
    )
    header = ["budget", "tokens/s", "read per token", "of a plain read", "prompt", "whole process", "peak memory"]
    yield table(header, [[cap_label(budget), *_budget(cell)] for budget, cell in data["budgets"].items()])


def _budget(cell: dict[str, Any]) -> list[str]:
    if "failed" in cell:
        return ["failed", *[NOTHING] * 5]
    share = cell["share_of_plain"]
    return [
        number(cell["decode_tok_per_s"]),
        megabytes(cell["bytes_read_per_token"]),
        NOTHING if share is None else f"{share:.0%}",
        f"{number(cell['ttft_s'])} s",
        f"{number(cell['wall_s'])} s",
        size(cell["peak_rss_bytes"]),
    ]


def experts(name: str, data: dict[str, Any]) -> Iterator[str]:
    """The cache of experts beside none: a table for each skew of the routers, then policies on synthetic traces."""
    yield (
        f"Synthetic: {data['model']}, {data['dtype']}, routers random too. {data['new_tokens']} tokens in a memory "
        f"cgroup of {number(data['budget_gb'])} GiB, runs of each: {data['repeat']}, in turn. *blocks*: no cache; "
        f"leading blocks of the experts' tensors are pinned, the others read once a router names them. *By plain "
        f"reads*: what a way's bytes allow for at the rate of plain reads, eight at once, just before the run. The "
        f"machine's other work slows both, and plain reads more than flashrt's."
    )
    for label, pack in data["packs"].items():
        use = ", ".join(f"{share:.0%}" for share in pack["use_by_rank"])
        same = "yes" if pack["same_tokens"] else "no"
        yield (
            f"{label}: experts get {use} of the tokens, from the favourite of each layer down. The same tokens from "
            f"all: {same}. The cache over blocks: {times(pack['cache_over_blocks'])} the tokens/s, "
            f"{pack['bytes_over_blocks']:.0%} of the bytes."
        )
        header = ["tokens/s", "read per token", "planned", "by plain reads", "of that", "experts in memory", "hits"]
        yield table(
            [label, *header, "read ahead, and right"],
            [[way, *_experts(cell)] for way, cell in pack["ways"].items()],
        )
    traces = data["synthetic_traces"]
    policies = list(next(iter(traces.values())))
    yield table(
        ["share of hits on synthetic traces", *policies],
        [[habit, *(f"{rates[policy]:.1%}" for policy in policies)] for habit, rates in traces.items()],
    )


def _experts(cell: dict[str, Any]) -> list[str]:
    cached = cell["expert_cache"] or {}
    ahead = cached.get("prefetch_accuracy")
    return [
        number(cell["decode_tok_per_s"]),
        megabytes(cell["bytes_read_per_token"]),
        megabytes(cell["planned_bytes_per_token"]),
        number(cell["roof_tok_per_s"]),
        f"{cell['share_of_roof']:.0%}",
        str(cell["expert_slots"] or NOTHING),
        f"{cached['hit_rate']:.0%}" if cached else NOTHING,
        NOTHING if ahead is None else f"{cached['prefetched']}, {ahead:.0%}",
    ]


def sparse(name: str, data: dict[str, Any]) -> Iterator[str]:
    """Speed of both modes, then what sparse mode costs on each text."""
    yield (
        f"{data['model']}, {data['dtype']}, calibrated for a loss of {data['max_loss']:.1%}, "
        f"{data['held_out_loss']:.2%} found on held-out tokens. Runs of {data['new_tokens']} tokens in turns, "
        f"{data['repeat']} of each; ratios of neighbours, medians."
    )
    header = [
        "budget",
        "exact, tokens/s",
        "sparse",
        "ratio",
        "exact reads per token",
        "sparse",
        "first token sooner by",
    ]
    yield table(
        header,
        [
            [
                cap_label(budget),
                *(number(cell[mode]["decode_tok_per_s"]) for mode in ("exact", "sparse")),
                times(cell["speedup"]),
                *(megabytes(cell[mode]["bytes_read_per_token"]) for mode in ("exact", "sparse")),
                times(cell["ttft"]),
            ]
            for budget, cell in data["speeds"].items()
        ],
    )
    yield table(
        [
            "text",
            "perplexity, exact",
            "sparse",
            "loss",
            "mean KL, nats",
            "worst",
            "same first choice",
            "FFN bytes",
            "rows",
        ],
        [
            [
                text,
                *(f"{found[key]:.3f}" for key in ("ppl_exact", "ppl_sparse")),
                f"{found['loss']:+.2%}",
                f"{found['kl_mean']:.4f}",
                number(found["kl_max"]),
                *(f"{found[key]:.1%}" for key in ("top1_agreement", "ffn_bytes_share", "rows_share")),
            ]
            for text, found in data["texts"].items()
        ],
    )


def disk_label(data: dict[str, Any]) -> str:
    rate = data.get("disk_gb_per_s")
    return f"The disk is held to {rate} GB/s." if rate else "The disk is as fast as it is."


def verification(name: str, data: dict[str, Any]) -> Iterator[str]:
    """What passes over several positions cost."""
    yield f"{data['pack']}, medians of passes in turns. {disk_label(data)}"
    yield table(
        ["budget", "positions", "ms", "waiting", "MB read", "times one position"],
        [
            [
                cap_label(budget),
                count,
                number(1e3 * figures["seconds"]),
                number(1e3 * figures["wait_s"]),
                number(figures["bytes_read"] / 1e6),
                times(figures["seconds"] / cell["passes"]["1"]["seconds"]),
            ]
            for budget, cell in data["budgets"].items()
            for count, figures in cell["passes"].items()
        ],
    )


def speculation(name: str, data: dict[str, Any]) -> Iterator[str]:
    """What drafting brings, by budget and kind of question; or what its parts bring."""
    yield (
        f"{data['pack']}, answers of {data['tokens']} tokens, greedy; medians over the questions of a kind. "
        f"{disk_label(data)}"
    )
    cells = [(budget, kind, cell) for budget, sets in data["budgets"].items() for kind, cell in sets.items()]
    if "auto" not in cells[0][2]:
        keys = ("tokens_per_pass", "positions_per_pass", "decode_tok_per_s")
        for budget, kind, cell in cells:
            yield f"{cap_label(budget)}, {kind}:"
            yield table(
                ["drafts", "tokens per pass", "positions", "tokens/s"],
                [[part, *(number(figures[key]) for key in keys)] for part, figures in cell.items()],
            )
        return
    yield table(
        [
            "budget",
            "questions",
            "tokens/s, off",
            "auto",
            "ratio",
            "tokens per pass",
            "positions",
            "drafts stand, by depth",
        ],
        [
            [
                cap_label(budget),
                f"{len(cell['speedups'])} {kind}",
                *(number(cell[mode]["decode_tok_per_s"]) for mode in ("off", "auto")),
                times(cell["speedup"]),
                *(number(cell["auto"][key]) for key in ("tokens_per_pass", "positions_per_pass")),
                ", ".join(f"{share:.0%}" for share in cell["acceptance"][:4]),
            ]
            for budget, kind, cell in cells
        ],
    )
    same = all(cell["same_text"] for _, _, cell in cells)
    yield f"The same text with and without drafts: {'yes' if same else 'NO'}."


def frontier(name: str, data: dict[str, Any]) -> Iterator[str]:
    yield (
        f"What a token touches of the feed-forward blocks against what it costs, by method, the same share in every "
        f"layer: {data['model']}, simulated. The methods are described in `tools/frontier.py`."
    )
    rows = [
        [row["method"], ", ".join(f"{share:.0%}" for share in row["point"]), f"{row['bytes']:.0%}",
         *(f"{loss:+.1%}" for loss in row["losses"])]
        for row in data["rows"]
    ]  # fmt: skip
    yield table(["method", "kept", "bytes", *(f"{text}, perplexity" for text in data["texts"])], rows)


def quality(name: str, data: dict[str, Any]) -> Iterator[str]:
    yield perplexity(data["perplexity"], data["tokens"], data["window"])


def perplexity(systems: dict[str, Any], tokens: int, window: int) -> str:
    """A row per system, each text with its change from bf16's where that was measured, else from the first row's."""
    base = systems.get("transformers bf16") or next(iter(systems.values()))
    texts = list(base)
    rows = [
        [system, *(f"{found[t]['ppl']:.3f} ({found[t]['ppl'] / base[t]['ppl'] - 1:+.2%})" for t in texts)]
        for system, found in systems.items()
    ]
    return table([f"perplexity, {tokens} tokens, windows of {window}", *texts], rows)


def io(name: str, data: dict[str, Any]) -> Iterator[str]:
    """The I/O engine beside its reference: blocks by size and depth, then merged rows."""
    yield (
        f"The I/O engine ({data['backend']}) beside {data['reference']}, in turn: medians of {data['repeat']} readings "
        f"of {number(data['seconds'])} s, ratios taken pair by pair, cores busy in user and system time."
    )
    header = ["engine", "reference", "ratio", "cores", "reference's cores"]
    yield table(
        ["reads", "of", "in flight", *header],
        [[p["order"], _kib(p["block"]), p["depth"], *_beside(p)] for p in data["blocks"]],
    )
    yield table(
        ["rows of", "asked for", "rows per read", "mean read", *header, "time, over unmerged"],
        [
            [
                *(f"{p['row_bytes']} B", f"{p['share']:.0%}", number(p["rows_per_read"]), _kib(p["bytes_per_read"])),
                *(*_beside(p), times(p["s_per_matrix"] / p["s_per_matrix_unmerged"])),
            ]
            for p in data["rows"]
        ],
    )


def _kib(nbytes: float) -> str:
    return f"{nbytes / 1024:,.0f} KiB"


def _beside(point: dict[str, Any]) -> list[str]:
    rates = [f"{number(point[key] / 1e6)} MB/s" for key in ("bytes_per_s", "reference_bytes_per_s")]
    return [*rates, *(f"{point[key]:.2f}" for key in ("ratio", "cores", "reference_cores"))]


def ablation(name: str, data: dict[str, Any]) -> Iterator[str]:
    """What each part of sparse mode by row saves."""
    naive = data["steps"][0]
    yield (
        f"{data['tokens']} tokens, each asking for {number(data['rows_per_token'])} neurons of feed-forward blocks of "
        f"{size(data['ffn_bytes'])} in all; from the second line on {data['resident']:.0%} of them are in memory. The "
        "steps are those of `tools/ablation.py`."
    )
    yield table(
        ["reading", "I/O, ms per token", "less by", "read per token", "less by", "in memory", "tokens/s"],
        [
            [
                step["name"],
                number(step["io_ms"]),
                times(naive["io_ms"] / step["io_ms"]),
                f"{step['bytes_read'] / 1e3:,.0f} kB",
                times(naive["bytes_read"] / step["bytes_read"]),
                "–" if step["hit_rate"] is None else f"{step['hit_rate']:.0%}",
                number(step["tok_per_s"]),
            ]
            for step in data["steps"]
        ],
    )
    if (last := data["steps"][-1]).get("recall") is not None:
        yield (
            f"Of the neurons that had to be read, {last['recall']:.0%} were guessed before attention; of those read "
            f"for a guess, {last['precision']:.0%} were used."
        )


def anything(name: str, data: dict[str, Any]) -> Iterator[str]:
    """Tables of a file whose shape is not known: one of its plain figures, one of each group of figures."""
    about = {"tool", "command", "date", "machine", "versions"}
    groups = {key: value for key, value in data.items() if key not in about}
    plain = {key: value for key, value in groups.items() if not isinstance(value, dict | list)}
    if plain:
        yield table(["figure", "value"], [[key, value_of(key, value)] for key, value in plain.items()])
    for key, value in groups.items():
        if rows := records(value):
            columns = list(dict.fromkeys(column for _, row in rows for column in row))
            yield table(
                [key, *columns],
                [[label, *(value_of(column, row.get(column)) for column in columns)] for label, row in rows],
            )


def records(group: Any) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a group: labels and plain figures. Lists of figures are single runs, whose median stands beside."""
    pairs: Iterable[tuple[Any, Any]] = ()
    if isinstance(group, dict):
        pairs = group.items()
    elif isinstance(group, list):
        pairs = enumerate((row for row in group if isinstance(row, dict)), start=1)
    rows = []
    for label, row in pairs:
        cells = row if isinstance(row, dict) else {"value": row}
        flat = {column: value for column, value in cells.items() if not isinstance(value, dict | list)}
        if flat:
            rows.append((str(label), flat))
    return rows


def value_of(name: str, value: Any) -> str:
    """A figure under a name that tells its unit."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NOTHING if value is None else str(value)
    if name.endswith("bytes_per_s"):
        return f"{value / 1e9:.2f} GB/s"
    return size(value) if name.endswith("bytes") else number(value)


def table(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def cap_label(cap: str) -> str:
    return "no limit" if cap == "none" else f"{cap} GiB"


def number(value: float | None) -> str:
    """Three digits of a measurement, all of a count."""
    if value is None:
        return NOTHING
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:#.3g}"


def times(value: float | None) -> str:
    return NOTHING if value is None else f"{number(value)}×"


def megabytes(value: float | None) -> str:
    return NOTHING if value is None else f"{value / 1e6:,.0f} MB"


def size(value: float) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 10 * 2**30 else f"{value / 2**20:,.0f} MiB"


if __name__ == "__main__":
    main()
