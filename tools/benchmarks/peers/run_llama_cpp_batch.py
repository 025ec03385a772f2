"""llama.cpp's batched decoding through llama-cpp-python's low-level interface: prompts of a file in parallel slots.

A slot that is done takes the next prompt at once. Prints one JSON object: tokens of answers, seconds without loading,
and what was answered.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


class Slots:
    """`count` sequences of `context` positions each."""

    def __init__(self, args: argparse.Namespace) -> None:
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.use_extra_bufts = not args.no_repack
        self.model = llama_cpp.llama_model_load_from_file(str(args.model).encode(), model)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_seq_max = args.context * args.slots, args.slots
        context.n_batch = context.n_ubatch = args.rows
        context.n_threads = context.n_threads_batch = args.threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.words = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.batch = llama_cpp.llama_batch_init(args.rows, 0, 1)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        out = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocab, data, len(data), out, len(out), True, False)
        return list(out[:count])

    def forget(self, slot: int) -> None:
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), slot, -1, -1)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Of rows (slot, position, token, last): the likeliest token after the last one of each slot."""
        batch = self.batch
        for i, (slot, position, token, last) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, last
            batch.seq_id[i][0] = slot
        batch.n_tokens = len(rows)
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        return {slot: self._likeliest(i) for i, (slot, _, _, last) in enumerate(rows) if last}

    def _likeliest(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.words,)).argmax())


def run(slots: Slots, prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    began, came = time.monotonic(), 0
    waiting = list(enumerate(prompts))[::-1]
    answers: list[list[int]] = [[] for _ in prompts]
    held: dict[int, tuple[int, list[int], int]] = {}  # slot: request, tokens to come, its position
    while (waiting or held) and time.monotonic() - began < args.seconds:
        for slot in range(args.slots):
            if slot not in held and waiting:
                slots.forget(slot)
                request, prompt = waiting.pop()
                held[slot] = request, prompt, 0
        rows: list[tuple[int, int, int, bool]] = []
        for slot, (_, tokens, position) in sorted(held.items(), key=lambda item: len(item[1][1])):  # answers first
            if len(rows) + len(tokens) <= args.rows:
                last = len(tokens) - 1
                rows += [(slot, position + i, token, i == last) for i, token in enumerate(tokens)]
        for slot, token in slots.decode(rows).items():
            request, tokens, position = held[slot]
            answers[request].append(token)
            came += 1
            held[slot] = request, [token], position + len(tokens)
            if len(answers[request]) == args.tokens:
                del held[slot]
    seconds = time.monotonic() - began
    digest = hashlib.sha256(json.dumps(answers).encode()).hexdigest()
    return {"tokens": came, "seconds": seconds, "tok_per_s": came / seconds, "answers": digest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path, help="a JSON list of texts")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=512, help="of a batch, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--no-repack", action="store_true")
    args = parser.parse_args()
    slots = Slots(args)
    prompts = [slots.tokenize(text) for text in json.loads(args.prompts.read_text())]
    print(json.dumps(run(slots, prompts, args)))


if __name__ == "__main__":
    main()
