"""llama.cpp through llama-cpp-python, as users run it: the file is memory-mapped, and weights that the CPU multiplies
faster in another layout are copied into it. With --no-repack they stay in the map, which takes less memory."""

from __future__ import annotations

import argparse
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp import Llama
from measure import Perplexity, Timeline, arguments, emit, windows


def main() -> None:
    args = arguments(__doc__)
    timeline = Timeline(args.seconds)
    if args.no_repack:
        leave_weights_in_the_map()
    llama = Llama(
        str(args.model),
        n_ctx=args.context,
        n_threads=args.threads,
        n_threads_batch=args.threads,
        logits_all=bool(args.score),
        verbose=False,
    )
    emit(score(llama, args) if args.score else generate(llama, args, timeline), "llama-cpp-python")


def leave_weights_in_the_map() -> None:
    """What `llama-cli --no-repack` does; Llama has no argument for it, so its defaults are changed."""
    defaults = llama_cpp.llama_model_default_params

    def without_repacking() -> llama_cpp.llama_model_params:
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_cpp.llama_model_default_params = without_repacking


def generate(llama: Llama, args: argparse.Namespace, timeline: Timeline) -> dict[str, Any]:
    """Continue the prompt greedily, or as it is drawn, past any end-of-text token."""
    drawing = {"temp": 0.0}
    if args.draw is not None:
        llama.set_seed(args.draw)
        drawing = {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    prompt = llama.tokenize(args.prompt_file.read_bytes(), add_bos=True, special=False)
    for _ in range(1 + args.warm):
        timeline.ask()
        llama.reset()
        for count, token in enumerate(llama.generate(prompt, reset=False, **drawing), start=1):
            timeline.token(token)
            if count == args.tokens or timeline.late:
                break
    return timeline.report(len(prompt))


def score(llama: Llama, args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of each text, in windows that start afresh."""
    result = {}
    for text in args.score:
        ids = llama.tokenize(text.read_bytes(), add_bos=False, special=False)[: args.score_tokens]
        perplexity = Perplexity()
        for window in windows(ids, llama.tokenize(b"", add_bos=True, special=False), args.context):
            llama.reset()
            llama.eval(window)
            perplexity.add(log_probabilities(llama.scores[: len(window) - 1], window[1:]))
        result[text.name] = perplexity.report()
    return {"perplexity": result}


def log_probabilities(logits: np.ndarray, following: list[int]) -> np.ndarray:
    """Of the token that follows each position."""
    peaks = logits.max(1, keepdims=True)
    totals = np.log(np.exp(logits - peaks).sum(1, dtype=np.float64)) + peaks[:, 0]
    return logits[np.arange(len(following)), following].astype(np.float64) - totals


if __name__ == "__main__":
    main()
