"""llama.cpp decoding at a long context that is not prefilled: a step after a short text, and one after a long one.

The keys and values of a text are computed once, and put behind themselves as often as it takes; llama.cpp rotates keys
for where they stand. The steps that are timed see all positions. tools.benchmarks.longctx starts this.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from measure import emit

BATCH = 512
SHORT = 64  # tokens of the text that is short
WARM_UP = 2
FLASH = {"off": 0, "on": 1}  # llama_flash_attn_type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="whose keys and values fill the context")
    parser.add_argument("--text-tokens", type=int, default=1024)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flash-attention", choices=FLASH, default="on")
    parser.add_argument("--no-repack", action="store_true")
    args = parser.parse_args()
    llama = LongContext(args)
    ids = llama.tokens(args.text.read_bytes())[: args.text_tokens]
    llama.decode(ids[:SHORT])
    short = llama.steps(args.steps)
    llama.fill(ids, args.context)
    long = llama.steps(args.steps)
    step, short_step = statistics.median(long), statistics.median(short)
    figures = {
        "decode_tok_per_s": len(long) / sum(long),
        "step_s": step,
        "short_step_s": short_step,
        "context_s": step - short_step,
        "step_s_all": long,
    }
    emit(figures, "llama-cpp-python")


class LongContext:
    """A model and one context, by the C interface: llama_cpp.Llama has no way to put keys and values elsewhere."""

    def __init__(self, args: argparse.Namespace) -> None:
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        model.use_extra_bufts = not args.no_repack
        self._model = llama_cpp.llama_model_load_from_file(str(args.model).encode(), model)
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = args.context + BATCH
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max, params.kv_unified = 2, True  # the text's sequence, and one to put copies through
        params.n_threads = params.n_threads_batch = args.threads
        params.flash_attn_type = FLASH[args.flash_attention]
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._memory: Any = llama_cpp.llama_get_memory(self._context)

    def tokens(self, text: bytes) -> list[int]:
        out = (llama_cpp.llama_token * len(text))()
        count = llama_cpp.llama_tokenize(self._vocab, text, len(text), out, len(text), True, False)
        return list(out[:count])

    def decode(self, ids: list[int]) -> None:
        for begin in range(0, len(ids), BATCH):
            part = ids[begin : begin + BATCH]
            held = (llama_cpp.llama_token * len(part))(*part)  # the batch has but a pointer to it
            batch = llama_cpp.llama_batch_get_one(held, len(part))
            if status := llama_cpp.llama_decode(self._context, batch):
                raise SystemExit(f"llama_decode returned {status}")

    def steps(self, count: int) -> list[float]:
        """Seconds of each of `count` greedy steps."""
        size, seconds = llama_cpp.llama_vocab_n_tokens(self._vocab), []
        for _ in range(WARM_UP + count):
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, -1), (size,))
            token, began = int(logits.argmax()), time.perf_counter()
            self.decode([token])
            llama_cpp.llama_synchronize(self._context)
            seconds.append(time.perf_counter() - began)
        return seconds[WARM_UP:]

    def fill(self, ids: list[int], length: int) -> None:
        """Make the sequence hold as many whole copies of the text as fit in `length` tokens; decode one token more."""
        llama_cpp.llama_memory_clear(self._memory, True)
        self.decode(ids)
        size = llama_cpp.llama_state_seq_get_size(self._context, 0)
        state = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self._context, state, size, 0)
        for start in range(len(ids), length - len(ids) + 1, len(ids)):
            if not llama_cpp.llama_state_seq_set_data(self._context, state, size, 1):
                raise SystemExit(f"{len(ids)} more tokens do not fit at {start}")
            llama_cpp.llama_memory_seq_add(self._memory, 1, 0, -1, start)
            llama_cpp.llama_memory_seq_cp(self._memory, 1, 0, -1, -1)
            llama_cpp.llama_memory_seq_rm(self._memory, 1, -1, -1)
        held = llama_cpp.llama_memory_seq_pos_max(self._memory, 0) + 1
        if held != length // len(ids) * len(ids):
            raise SystemExit(f"the sequence holds {held} tokens, expected {length // len(ids) * len(ids)}")
        self.decode(ids[:1])


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    """llama.cpp writes a page on loading."""


if __name__ == "__main__":
    main()
