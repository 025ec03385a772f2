"""llama.cpp's prefill of the first tokens of some texts, by its C interface. tools.benchmarks.prefill starts this."""

from __future__ import annotations

import argparse
import ctypes
import time
from pathlib import Path

import llama_cpp
from measure import emit

FLASH = {"off": 0, "on": 1}  # llama_flash_attn_type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flash-attention", choices=FLASH, default="on")
    args = parser.parse_args()
    llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(args.model).encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = args.tokens + 256
    params.n_batch, params.n_ubatch = max(args.ubatch, 2048), args.ubatch
    params.n_threads = params.n_threads_batch = args.threads
    params.flash_attn_type = FLASH[args.flash_attention]
    context = llama_cpp.llama_init_from_model(model, params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    prompt = [token for path in args.texts for token in tokens(vocab, path.read_bytes())][: args.tokens]
    if len(prompt) < args.tokens:
        raise SystemExit(f"the texts have {len(prompt)} tokens, {args.tokens} are wanted")
    began = time.perf_counter()
    for begin in range(0, len(prompt), params.n_batch):
        part = prompt[begin : begin + params.n_batch]
        held = (llama_cpp.llama_token * len(part))(*part)  # the batch has but a pointer to it
        if status := llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(held, len(part))):
            raise SystemExit(f"llama_decode returned {status}")
    llama_cpp.llama_synchronize(context)
    emit({"seconds": time.perf_counter() - began}, "llama-cpp-python")


def tokens(vocab: ctypes.c_void_p, text: bytes) -> list[int]:
    out = (llama_cpp.llama_token * len(text))()
    count = llama_cpp.llama_tokenize(vocab, text, len(text), out, len(text), False, False)
    return list(out[:count])


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    """llama.cpp writes a page on loading."""


if __name__ == "__main__":
    main()
