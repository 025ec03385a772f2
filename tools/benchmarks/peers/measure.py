"""What the runners share: their arguments, the timeline of a generation, the line of JSON that they end with.

A runner works in its peer's own environment, so this file needs the standard library only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", type=Path, required=True, help="what this peer loads")
    parser.add_argument("--prompt-file", type=Path, help="the text to continue")
    parser.add_argument("--tokens", type=int, default=16, help="how many to generate")
    parser.add_argument("--context", type=int, default=1024, help="tokens of prompt and answer, or of a scored window")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end early when the process is this old")
    parser.add_argument("--warm", action="store_true", help="generate twice, time the second")
    parser.add_argument("--scratch", type=Path, help="folder for what the peer writes to disk")
    parser.add_argument("--no-repack", action="store_true", help="llama.cpp: keep weights in the file's layout")
    parser.add_argument("--draw", type=int, metavar="SEED", help="llama.cpp: draw tokens at temperature 1, from all")
    parser.add_argument("--score", type=Path, nargs="+", help="measure the perplexity of these texts instead")
    parser.add_argument("--score-tokens", type=int, default=2048)
    return parser.parse_args()


class Timeline:
    """When each token came, and how much this process had read from disk by then."""

    def __init__(self, seconds: float = math.inf) -> None:
        self._start = process_start()
        self._deadline = self._start + seconds
        self._asked: list[float] = []
        self._first: float | None = None
        self._tokens: list[tuple[int, float, int]] = []

    def ask(self) -> None:
        """The model is ready and the prompt handed over. Asking again starts afresh."""
        self._asked.append(now())
        self._tokens.clear()

    def token(self, token: int) -> None:
        self._tokens.append((token, now(), read_bytes()))
        self._first = self._first or self._tokens[0][1]

    @property
    def late(self) -> bool:
        return now() > self._deadline

    def report(self, prompt_tokens: int) -> dict[str, Any]:
        """The figures: times in seconds, from the start of the process where nothing else is said."""
        ids, times, read = zip(*self._tokens, strict=True)
        decoded = len(ids) - 1
        assert self._first is not None, "there is a token, so there is a first one"
        return {
            "prompt_tokens": prompt_tokens,
            "token_ids": ids,
            "load_s": self._asked[0] - self._start,
            "first_token_s": self._first - self._start,
            "prefill_s": times[0] - self._asked[-1],
            "decode_tok_per_s": decoded / (times[-1] - times[0]) if decoded else None,
            "bytes_read_per_token": (read[-1] - read[0]) / decoded if decoded else None,
        }


class Perplexity:
    """Sums up log-probabilities of what came next, given windows of logits."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(self, log_probabilities: Any) -> None:
        self._total += float(log_probabilities.sum())
        self._count += len(log_probabilities)

    def report(self) -> dict[str, float]:
        return {"ppl": math.exp(-self._total / self._count), "tokens": self._count}


def windows(ids: list[int], prefix: list[int], length: int) -> list[list[int]]:
    """Consecutive windows of at most `length` tokens, each begun with `prefix`; those that predict something."""
    step = length - len(prefix)
    parts = [prefix + ids[begin : begin + step] for begin in range(0, len(ids), step)]
    return [part for part in parts if len(part) > 1]


def now() -> float:
    """Seconds since boot: the clock that the kernel notes the start of processes with."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_start() -> float:
    """When this process began, to a hundredth of a second."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def read_bytes() -> int:
    """Bytes that this process made the disk read: page faults on mapped files count, hits in the page cache do not."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def emit(report: dict[str, Any], *packages: str) -> None:
    """Print the line that the harness reads, with the versions that made it."""
    print(json.dumps(report | {"versions": {name: version(name) for name in packages}}), flush=True)
