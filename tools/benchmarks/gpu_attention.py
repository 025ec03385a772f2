"""Speed of a decode step's attention on a GPU: over the tokens that labels choose, beside all of them.

Shapes and shares of the Double Sparsity paper (arXiv 2408.07092), which reports up to 14.1 times: heads of Llama-2-7B,
a sixteenth of the tokens, labels of a sixteenth of the bytes of K, many sequences in a batch. A batch of sequences of
one length is one cache of as many times the KV heads. `dense` is torch's scaled_dot_product_attention, which the paper
compares with; `dense list` is our own kernel over all tokens. `sparse` has all that a step needs: it scores labels,
chooses blocks, lists their tokens and attends to these; with `host` their K and V come over the bus from pinned memory.

`tools.benchmarks.gpu_report` calls it; `python -m tools.benchmarks.gpu_attention` runs it alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashrt_kernels.gpu import attention_list, select_blocks
from flashrt_kernels.labels import label_shape
from tools.benchmarks.gpu_kernels import BYTES, Timer, graph_seconds
from tools.benchmarks.harness.record import Benchmark
from tools.benchmarks.harness.samples import table

KEEP = 16  # a token of so many is attended to
BLOCK = 8
RECENT = 32  # tokens at the end that are always attended to; of the first ones a block
SHARE = 0.8  # of the GPU's free memory that caches may take


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer's attention."""

    name: str
    heads: int
    kv_heads: int
    dim: int
    channels: int  # of labels: a sixteenth of K's bytes with as many as D / 4

    def kv_bytes(self, batch: int, context: int) -> int:
        return batch * self.kv_heads * context * 2 * self.dim * torch.bfloat16.itemsize


LLAMA_2 = Shape("llama-2-7b", 32, 32, 128, 32)
LLAMA_3 = Shape("llama-3-8b", 32, 8, 128, 32)
CASES = [(LLAMA_2, batch, context) for batch in (4, 32) for context in (2048, 4096, 8192, 16384)]
CASES += [(LLAMA_3, 1, context) for context in (32768, 131072, 262144)]


class Step:
    """A layer with random K, V, labels and queries of a batch of sequences, whose attention can be timed."""

    def __init__(self, shape: Shape, batch: int, context: int, device: str) -> None:  # context: a multiple of 16
        kv_heads, self.scale = batch * shape.kv_heads, shape.dim**-0.5
        made = partial(torch.randn, generator=torch.Generator(device).manual_seed(1), device=device)
        self.kv = made((kv_heads, context, 2, shape.dim), dtype=torch.bfloat16)
        self.q = made((1, batch * shape.heads, shape.dim))
        self.q_labels = made((1, batch * shape.heads, shape.channels))
        size = label_shape(kv_heads, context, shape.channels)
        self.labels = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
        self.step = torch.full((kv_heads, shape.channels), 0.3, device=device)
        self.ends = torch.tensor([(context - RECENT) // BLOCK], dtype=torch.int32, device=device)
        recent = torch.arange(context - RECENT, context, dtype=torch.int32, device=device)
        always = torch.cat((torch.arange(BLOCK, dtype=torch.int32, device=device), recent))
        self.always = always.expand(1, kv_heads, -1)
        kept = max((context // KEEP - len(always)) // BLOCK, 1)
        self.keep = torch.full((1, kv_heads), kept, dtype=torch.int32, device=device)
        self.chosen = torch.empty((1, kv_heads, kept), dtype=torch.int32, device=device)
        self.counts = torch.empty_like(self.keep)
        self.offsets = torch.arange(BLOCK, dtype=torch.int32, device=device)
        everything = torch.arange(context, dtype=torch.int32, device=device)
        self.everything = everything.expand(1, kv_heads, -1).contiguous()
        self.out = torch.empty((1, batch * shape.heads * shape.dim), device=device)
        # What SDPA takes: a batch of one head each for every KV head, with the queries of its group as tokens.
        self.grouped = self.q.view(kv_heads, 1, -1, shape.dim).to(torch.bfloat16)

    def dense(self) -> Tensor:
        k, v = self.kv[:, None].unbind(3)
        return torch.nn.functional.scaled_dot_product_attention(self.grouped, k, v, scale=self.scale)

    def dense_list(self) -> None:
        self._attend(self.kv, self.everything)

    def sparse(self, kv: Tensor | None = None) -> None:
        """kv: another place of keys and values."""
        select_blocks(
            self.q_labels, self.labels, self.step, self.scale, 1, self.ends, self.keep, BLOCK, self.chosen, self.counts
        )
        tokens = (self.chosen[..., None] * BLOCK + self.offsets).flatten(2)
        self._attend(self.kv if kv is None else kv, torch.cat((tokens, self.always), 2))

    def _attend(self, kv: Tensor, lists: Tensor) -> None:
        counts = torch.full(lists.shape[:2], lists.shape[2], dtype=torch.int32, device=lists.device)
        attention_list(self.q, kv, None, lists, counts, self.scale, None, self.out)


def measure() -> list[dict[str, Any]]:
    """All figures, on a CUDA device."""
    results = []
    for shape, batch, context in CASES:
        labelled = {"shape": shape.name, "tokens": batch, "context": context}
        free, _ = torch.cuda.mem_get_info()
        if max(shape.kv_bytes(batch, context), BYTES) > SHARE * free:
            results.append({"kernel": "left out, as its K and V do not fit", **labelled})
            continue
        results += [figures | labelled for figures in rates(shape, batch, context, "cuda", BYTES, graph_seconds)]
        torch.cuda.empty_cache()
    return results


def rates(shape: Shape, batch: int, context: int, device: str, nbytes: int, seconds: Timer) -> Iterator[dict[str, Any]]:
    """Microseconds of a layer's attention in each way, taking turns over as many layers as have `nbytes` of K and V.

    Speedups are over torch's dense one.
    """
    steps = [Step(shape, batch, context, device) for _ in range(max(nbytes // shape.kv_bytes(batch, context), 1))]
    ways: dict[str, list[Callable[[], object]]] = {
        "dense": [step.dense for step in steps],
        "dense list": [step.dense_list for step in steps],
        "sparse": [step.sparse for step in steps],
    }
    if batch == 1:
        hosts = [step.kv.cpu().pin_memory() if device == "cuda" else step.kv for step in steps]
        ways["sparse, host"] = [partial(step.sparse, host) for step, host in zip(steps, hosts, strict=True)]
    found = {name: seconds(calls) for name, calls in ways.items()}
    for name, took in found.items():
        yield {"kernel": name, "microseconds": round(took * 1e6, 1), "speedup": round(found["dense"] / took, 2)}


def main(arguments: Sequence[str] | None = None) -> int:
    benchmark = Benchmark("tools.benchmarks.gpu_attention", __doc__)
    benchmark.parse(arguments)
    if not torch.cuda.is_available():
        print("no GPU to measure: torch sees no CUDA device. Nothing was done.")
        return 0
    samples = measure()
    columns = {"shape": "", "tokens": "", "context": "", "kernel": "", "microseconds": "number", "speedup": "ratio"}
    rows = [[sample.get(name) for name in columns] for sample in samples]
    text = f"A layer's attention in a decode step, 1/{KEEP} of the tokens, on {torch.cuda.get_device_name()}."
    benchmark.publish({"keep": 1 / KEEP}, samples, {"text": [text], "tables": [table(list(columns.items()), rows)]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
