#!/usr/bin/env python3
"""Perplexity of packs beside each other, and beside transformers on the checkpoint that they were made from.

    python -m tools.benchmarks.quality PACK [PACK ...] [--checkpoint HF_DIR] [--tokens 2048] [--window 1024]

The texts are the first tokens of tools/texts/*.txt, or of --text-file. Windows start afresh; every token but a window's
first is predicted. transformers (bfloat16, in memory) runs in a process of its own. --as-decoded scores the packs with
the kernels of decoding, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.benchmarks.harness import facts, runs
from tools.benchmarks.harness.record import Benchmark, say
from tools.benchmarks.harness.samples import Sample, grouped, table
from tools.benchmarks.peers.measure import Perplexity, windows

TEXTS = sorted((facts.ROOT / "tools" / "texts").glob("*.txt"))
BASE = "transformers bf16"


def main(arguments: Sequence[str] | None = None) -> None:
    benchmark = Benchmark("tools.benchmarks.quality", __doc__)
    parser = benchmark.parser
    parser.add_argument("packs", nargs="*", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="Hugging Face directory to run with transformers")
    parser.add_argument("--text-file", type=Path, action="append")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--as-decoded", action="store_true", help="score with the kernels of decoding, too")
    args = benchmark.parse(arguments)
    texts, samples = args.text_file or TEXTS, []
    for text in texts if args.checkpoint else []:
        scored = runs.in_child(reference, args.checkpoint, text, args.tokens, args.window)
        samples.append({"system": BASE, "text": text.name} | scored)
        say(str(samples[-1]))
    for pack in args.packs:
        for options in ([], ["--as-decoded"])[: 1 + args.as_decoded]:
            system = " ".join(["flashrt", facts.pack(pack)["dtype"], *(["as decoded"] if options else [])])
            for text in texts:
                samples.append({"system": system, "text": text.name} | evaluate(pack, text, args, options))
                say(str(samples[-1]))
    parameters = {"models": sorted({facts.pack(pack)["model"] for pack in args.packs})}
    parameters |= {"tokens": args.tokens, "window": args.window}
    tables = [perplexity_table(samples, args.tokens, args.window)]
    benchmark.publish(parameters, samples, {"tables": tables})


def evaluate(pack: Path, text: Path, args: argparse.Namespace, options: list[str]) -> Sample:
    """Perplexity by the installed program."""
    length = ["--ctx", str(args.window), "--max-tokens", str(args.tokens)]
    report = runs.flashrt_eval("ppl", pack, "--text-file", str(text), *length, *options)
    return {"ppl": report["ppl"], "tokens": report["tokens"]}


def reference(checkpoint: Path, text: Path, tokens: int, window: int) -> Sample:
    """Perplexity by transformers in bfloat16, in the same windows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)[:tokens]
    perplexity = Perplexity()
    for part in windows(ids, tokenizer.encode(""), window):
        with torch.no_grad():
            scores = model(torch.tensor([part])).logits[0].float().log_softmax(-1)
        perplexity.add(scores[:-1].gather(1, torch.tensor(part[1:])[:, None])[:, 0].double())
    return perplexity.report()


def perplexity_table(samples: list[Sample], tokens: int, window: int) -> dict[str, Any]:
    """A row per system, each text with its change from bf16's where that was measured, else from the first row's."""
    systems = [system for (system,) in grouped(samples, "system")]
    base = BASE if BASE in systems else systems[0]
    texts = [text for (text,) in grouped(samples, "text")]
    found = {(sample["system"], sample["text"]): sample["ppl"] for sample in samples}
    rows = [
        [system, *(figure for t in texts for figure in (found[system, t], found[system, t] / found[base, t] - 1))]
        for system in systems
    ]
    columns = [column for text in texts for column in ((text, "ppl"), (f"over {base}", "change"))]
    return table([f"perplexity, {tokens} tokens, windows of {window}", *columns], rows)


if __name__ == "__main__":
    main()
