"""Answers prompts one after the other with drafts on, as `flashrt serve` does: what a batch is compared with.

    python -m tools.benchmarks.one_by_one PACK PROMPTS.json --budget-gb 0.6 --count 8 --tokens 64

Prints one JSON object: tokens, seconds without loading, and the texts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import flashrt


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pack", type=Path)
    parser.add_argument("prompts", type=Path, help="a JSON list of texts")
    parser.add_argument("--budget-gb", type=float)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--count", type=int, default=8, help="of the prompts, the first")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--cache-dir", type=Path)
    args = parser.parse_args(arguments)
    prompts = json.loads(args.prompts.read_text())[: args.count]
    options = {"context": args.context, "cache_dir": args.cache_dir}
    with flashrt.load(args.pack, budget_gb=args.budget_gb, **options) as engine:
        began, texts, tokens = time.monotonic(), [], 0
        for prompt in prompts:
            generation = engine.generate(prompt, args.tokens, ignore_eos=True)
            for _ in generation:
                pass
            texts.append(generation.report.text)
            tokens += generation.report.new_tokens
        seconds = time.monotonic() - began
    print(json.dumps({"tokens": tokens, "seconds": seconds, "tok_per_s": tokens / seconds, "texts": texts}))


if __name__ == "__main__":
    main()
