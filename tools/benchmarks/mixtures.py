#!/usr/bin/env python3
"""A mixture of experts that does not fit in memory: flashrt beside llama.cpp, which maps the file.

    python -m tools.benchmarks.mixtures FOLDER --preset qwen3.5-35b-a3b --budget 8 \\
        --out docs/benchmarks/mixtures-NAME.json

A GGUF file of random weights is written to FOLDER (tools.make_synthetic_gguf says what its routers do), and packed
without changing a code; files that are there already are taken. Every run is a process of its own in a memory cgroup of
the budget, with nothing of the file in the page cache; the systems take turns. Both draw tokens at temperature 1, each
with its own generator: the texts differ, how long they stay with a topic does not. llama.cpp leaves weights in the map
(`--no-repack`): its other layouts are copies, which the budget has no room for. Its page faults read as much ahead as
the disk is set to; where that is more than Linux's 128 KiB, --read-ahead-kib 128 does it better.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from flashrt.storage.pack import Pack
from tools.benchmarks.harness import facts, runs
from tools.benchmarks.harness.disk import plain_rates, read_ahead
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, in_turn, only, ratios, spread, table, tabulated
from tools.make_synthetic_gguf import PRESETS, STAY, TOPIC_SHARE, make

PROMPT = "Experts of a mixture"
RUNNER = Path(__file__).parent / "peers" / "run_llama_cpp.py"
SYSTEMS = ("flashrt", "llama.cpp")
PLAIN_BYTES = 1 << 30  # of a reading of the disk
CHANGED = ("layers", "vocab", "experts")  # numbers of a preset that may be replaced
COLUMNS = {
    "decode_tok_per_s": ("tokens/s", "number"),
    "bytes_read_per_token": ("read per token", "MB"),
    "share_of_disk": ("of the disk's rate", "share"),
    "hit_rate": ("experts found in memory", "share"),
    "peak_bytes": ("peak", "MB"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.mixtures", __doc__)
    parser = benchmark.parser
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=PRESETS, required=True)
    for name in CHANGED:
        parser.add_argument(f"--{name}", type=int, metavar="N", help="in place of the preset's")
    parser.add_argument("--budget", default="8", metavar="GIB")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--read-ahead-kib", type=int, help="what page faults read; omitted: what the disk is set to")
    parser.add_argument("--peers", type=Path, default=facts.ROOT / ".peers", help="what `make peers` made")
    args = benchmark.parse(arguments)
    shape = replace(PRESETS[args.preset], **{n: v for n in CHANGED if (v := getattr(args, n)) is not None})
    gguf, pack = args.folder / f"{args.preset}.gguf", args.folder / args.preset
    if not gguf.exists():
        say(f"writing {gguf}")
        make(gguf, shape)
    if not (pack / "manifest.json").exists():
        subprocess.run([sys.executable, "-m", "flashrt", "pack", str(gguf), str(pack)], check=True)
    samples = []
    with read_ahead(gguf, args.read_ahead_kib) as ahead:
        for turn in range(args.repeat):
            for system in in_turn(SYSTEMS, turn):
                samples.append({"system": system, "round": turn} | measure(args, system, gguf, pack))
                say(f"{turn + 1}/{args.repeat}  {line(samples[-1])}")
    parameters = {
        "model": f"random weights in the shape of {args.preset}",
        "shape": asdict(shape),
        "file_bytes": gguf.stat().st_size,
        "topic_share": TOPIC_SHARE,
        "stay": STAY,
        "budget_gb": float(args.budget),
        "tokens": args.tokens,
        "threads": args.threads,
        "read_ahead_kib": ahead,
    }
    benchmark.publish(parameters, samples, summary(parameters, samples))


def measure(args: argparse.Namespace, system: str, gguf: Path, pack: Path) -> Sample:
    """One run, after the disk was measured."""
    disk = plain_rates(Pack(pack).largest_file, PLAIN_BYTES)["disk_deep_bytes_per_s"]
    runs.forget(gguf)
    run = _flashrt if system == "flashrt" else _llama_cpp
    report, outcome = runs.confined(run(args, gguf, pack), args.budget)
    read, rate = report["bytes_read_per_token"], report["decode_tok_per_s"]
    return {
        "decode_tok_per_s": rate,
        "bytes_read_per_token": read,
        "share_of_disk": read * rate / disk,
        "hit_rate": (report.get("expert_cache") or {}).get("hit_rate"),
        "disk_deep_bytes_per_s": disk,
        "peak_bytes": outcome.peak_bytes,
        "limited": outcome.limited,
    }


def _flashrt(args: argparse.Namespace, gguf: Path, pack: Path) -> list[str]:
    command = [*runs.flashrt("run", pack), "--budget-gb", args.budget, "--raw", "--prompt", PROMPT]
    command += ["--ignore-eos"]
    command += ["--temperature", "1", "--top-k", "0", "--seed", "1", "--threads", str(args.threads)]
    return [*command, "--max-new-tokens", str(args.tokens), "--context", str(args.tokens + len(PROMPT))]


def _llama_cpp(args: argparse.Namespace, gguf: Path, pack: Path) -> list[str]:
    prompt = args.folder / "prompt.txt"
    prompt.write_text(PROMPT)
    command = [str(args.peers / "llama.cpp" / "bin" / "python"), str(RUNNER), "--model", str(gguf), "--no-repack"]
    command += ["--prompt-file", str(prompt), "--tokens", str(args.tokens), "--draw", "1"]
    return [*command, "--context", str(args.tokens + len(PROMPT)), "--threads", str(args.threads)]


def summary(parameters: dict[str, Any], samples: list[Sample]) -> dict[str, Any]:
    """Both systems, and the one over the other."""
    text = [
        f"Synthetic: {parameters['model']}, {parameters['shape']['layers']} layers, a file of "
        f"{parameters['file_bytes'] / 1e9:.1f} GB, in a memory cgroup of {parameters['budget_gb']:g} GiB. "
        f"{parameters['tokens']} tokens, drawn; page faults read {parameters['read_ahead_kib']} KiB ahead. "
        "Routers name much the same experts while a topic lasts."
    ]
    both = [s for system in SYSTEMS for s in only(samples, system=system)]
    pair = only(samples, system="flashrt"), only(samples, system="llama.cpp")
    over = [[spread(ratios(*pair, name)) for name in ("decode_tok_per_s", "bytes_read_per_token")]]
    columns = [("flashrt over llama.cpp, tokens/s", "ratio"), ("bytes read", "ratio")]
    return {"text": text, "tables": [tabulated(both, {"system": "system"}, COLUMNS), table(columns, over)]}


def line(sample: Sample) -> str:
    hits = "" if sample["hit_rate"] is None else f"  {sample['hit_rate']:.0%} hits"
    return (
        f"{sample['system']:<10} {sample['decode_tok_per_s']:6.3f} tok/s  "
        f"{sample['bytes_read_per_token'] / 1e6:8.1f} MB/token  peak {sample['peak_bytes'] / 1e9:.2f} GB  "
        f"the disk gave {sample['disk_deep_bytes_per_s'] / 1e9:.2f} GB/s{hits}"
    )


if __name__ == "__main__":
    main()
