#!/usr/bin/env python3
"""Perplexity of packs beside each other, and beside transformers on the checkpoint that they were made from.

    python tools/quality.py PACK [PACK ...] [--checkpoint HF_DIR] [--tokens 2048] [--window 1024]

The texts are the first tokens of tools/texts/*.txt, or of --text-file. Windows start afresh; every token but a window's
first is predicted. transformers (bfloat16, in memory) runs in a process of its own. --as-decoded scores the packs with
the kernels of decoding, too. JSON is printed last.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

TEXTS = sorted((Path(__file__).parent / "texts").glob("*.txt"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packs", nargs="*", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="Hugging Face directory to run with transformers")
    parser.add_argument("--text-file", type=Path, action="append")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--as-decoded", action="store_true", help="score with the kernels of decoding, too")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--transformers-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    texts = args.text_file or TEXTS
    if args.transformers_only:
        print(json.dumps({text.name: reference(args.checkpoint, text, args) for text in texts}))
        return
    results: dict[str, dict[str, Any]] = {}
    if args.checkpoint:
        results["transformers bf16"] = in_child(args)
    for pack in args.packs:
        for options in ([], ["--as-decoded"])[: 1 + args.as_decoded]:
            name = " ".join([label(pack), *(option.lstrip("-").replace("-", " ") for option in options)])
            results[name] = {text.name: evaluate(pack, text, args, options) for text in texts}
            print(name, results[name], file=sys.stderr)
    result = {"tool": "quality", "tokens": args.tokens, "window": args.window, "perplexity": results}
    result["relative_to_first"] = relative(results)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def label(pack: Path) -> str:
    from flashrt.storage.pack import Pack

    return f"flashrt {Pack(pack).manifest.dtype.value}"


def evaluate(pack: Path, text: Path, args: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    """Perplexity by the installed program."""
    command = [sys.executable, "-m", "flashrt", "eval", "ppl", str(pack), "--text-file", str(text), "--json"]
    command += ["--ctx", str(args.window), "--max-tokens", str(args.tokens), *options]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    report = json.loads(output.splitlines()[-1])
    return {"ppl": report["ppl"], "tokens": report["tokens"]}


def in_child(args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--transformers-only", "--checkpoint", str(args.checkpoint)]
    command += ["--tokens", str(args.tokens), "--window", str(args.window)]
    for text in args.text_file or []:
        command += ["--text-file", str(text)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result = json.loads(output.splitlines()[-1])
    print("transformers bf16", result, file=sys.stderr)
    return dict(result)


def reference(checkpoint: Path, text: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity by transformers in bfloat16, in the same windows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    prefix = tokenizer.encode("")
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), add_special_tokens=False)[: args.tokens]
    step, total, count = args.window - len(prefix), 0.0, 0
    for begin in range(0, len(ids), step):
        window = torch.tensor([prefix + ids[begin : begin + step]])
        if window.shape[1] < 2:
            continue
        with torch.no_grad():
            scores = model(window).logits[0].float().log_softmax(-1)
        total -= float(scores[:-1].gather(1, window[0, 1:, None]).double().sum())
        count += window.shape[1] - 1
    return {"ppl": math.exp(total / count), "tokens": count}


def relative(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Each system's perplexity as a change from the first one's."""
    base = next(iter(results.values()), {})
    return {
        name: {text: figures["ppl"] / base[text]["ppl"] - 1 for text, figures in texts.items()}
        for name, texts in results.items()
    }


if __name__ == "__main__":
    main()
