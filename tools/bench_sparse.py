#!/usr/bin/env python3
"""Exact and sparse mode of a calibrated pack beside each other: speed in turns under several budgets, and quality.

    python -m tools.bench_sparse PACK --budgets 0.8 none --texts a.txt b.txt c.txt --out sparse-NAME.json

Every run is a fresh process inside a memory cgroup of exactly its budget ('none': no limit), exact and sparse mode in
turns, and ratios are of neighbours: medians of them are quoted. Quality is that of `flashrt eval quality` on each text.
Prints JSON last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from flashrt.storage.manifest import SPARSE_DIR
from flashrt.storage.pack import Pack
from tools.machine import facts
from tools.run_in_cgroup import run_limited

GIB = 1 << 30
NO_LIMIT = 1 << 50
MODES = ("exact", "sparse")
PROMPT = "Write a Python function that merges two sorted lists, explain how it works, and give three examples.\n"
FIGURES = ("decode_tok_per_s", "ttft_s", "bytes_read_per_token", "peak_rss_bytes", "ffn_bytes_share")
QUALITY = (
    "ppl_exact", "ppl_sparse", "loss", "max_loss", "kl_mean", "kl_max", "top1_agreement", "ffn_bytes_share",
    "rows_share", "predictor_bytes_share", "recall", "precision", "tokens",
)  # fmt: skip


def measure(pack: Path, mode: str, budget: str, tokens: int, prompt: str) -> dict[str, Any]:
    """One run's report. Raises SystemExit, with its last words, where it fails."""
    command = [sys.executable, "-m", "flashrt", "run", str(pack), "--mode", mode, "--json", "--ignore-eos"]
    command += ["--speculate", "off"]
    command += ["--prompt", prompt, "--max-new-tokens", str(tokens)]
    command += [] if budget == "none" else ["--budget-gb", budget]
    outcome = run_limited(command, NO_LIMIT if budget == "none" else int(float(budget) * GIB))
    if outcome.returncode != 0:
        raise SystemExit(f"{mode} at {budget}: {outcome.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(outcome.stdout.splitlines()[-1]))


def compare(runs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """Medians of both modes, and of the ratios of neighbours."""
    result: dict[str, Any] = {}
    for i, mode in enumerate(MODES):
        values = {name: [pair[i][name] for pair in runs] for name in FIGURES}
        result[mode] = {
            name: statistics.median(found) for name, found in values.items() if all(v is not None for v in found)
        }
    ratios = [pair[1]["decode_tok_per_s"] / pair[0]["decode_tok_per_s"] for pair in runs]
    waits = [pair[0]["ttft_s"] / pair[1]["ttft_s"] for pair in runs]
    return result | {"speedup": statistics.median(ratios), "speedups": ratios, "ttft": statistics.median(waits)}


def quality(pack: Path, text: Path, tokens: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "flashrt", "eval", "quality", str(pack), "--text-file", str(text)]
    command += ["--max-tokens", str(tokens), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return {name: found[name] for name in QUALITY}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Exact and sparse mode, in turns.")
    parser.add_argument("pack", type=Path)
    parser.add_argument("--budgets", nargs="*", default=["none"], metavar="GIB", help="GiB, or none")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--texts", type=Path, nargs="*", default=[])
    parser.add_argument("--text-tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    given = parser.parse_args(arguments)
    speeds: dict[str, Any] = {}
    for budget in given.budgets:
        runs = []
        for _ in range(given.repeat):
            exact, sparse = (measure(given.pack, mode, budget, given.tokens, given.prompt) for mode in MODES)
            runs.append((exact, sparse))
        speeds[budget] = compare(runs)
        print(f"{budget}: sparse {speeds[budget]['speedup']:.2f} times exact mode's speed", file=sys.stderr)
    texts = {text.name: quality(given.pack, text, given.text_tokens) for text in given.texts}
    for name, found in texts.items():
        print(f"{name}: {found['loss']:+.2%} at {found['ffn_bytes_share']:.1%} of the bytes", file=sys.stderr)
    calibrated = Pack(given.pack / SPARSE_DIR).manifest
    assert calibrated.sparsity is not None
    names = " ".join(text.name for text in given.texts)
    result = {
        "tool": "bench_sparse",
        "command": f"python -m tools.bench_sparse PACK --budgets {' '.join(given.budgets)} --texts {names}",
        "model": calibrated.name,
        "dtype": calibrated.dtype.value,
        "machine": facts(),
        "max_loss": calibrated.sparsity.max_loss,
        "held_out_loss": calibrated.sparsity.held_out_loss,
        "new_tokens": given.tokens,
        "repeat": given.repeat,
        "speeds": speeds,
        "texts": texts,
    }
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
