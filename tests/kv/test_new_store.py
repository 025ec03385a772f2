"""Another kind of KV store, defined here and named to the runtime: nothing else need know of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from flashrt.engine.runtime import CpuRuntime
from flashrt.kv.base import Allocate, Kernels, KvLimits, KvRows, KvStore
from flashrt.spec import Attention
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint

PAGE = 7  # positions


class PagedStore(KvStore):
    """Pages of a few positions, each [position, K or V, kv_heads, head_dim]."""

    opened = 0

    @classmethod
    def claim(cls, attention: Attention, limits: KvLimits) -> int | None:
        return limits.nbytes(attention, -(-limits.context // PAGE) * PAGE)

    def __init__(self, attention: Attention, limits: KvLimits, kernels: Kernels, allocate: Allocate) -> None:
        type(self).opened += 1
        self._attention, self._kernels = attention, kernels
        shape = (PAGE, 2, attention.kv_heads, attention.head_dim)
        self._pages = [allocate(shape, limits.codec.dtype) for _ in range(-(-limits.context // PAGE))]

    def append(self, key: np.ndarray, value: np.ndarray, start: int) -> None:
        for i, pair in enumerate(zip(key, value, strict=True)):
            self._at(start + i)[:] = pair

    def attend(self, query: np.ndarray, rows: KvRows, heads: slice, out: np.ndarray, sinks: Any = None) -> None:
        count = rows.start + len(query)
        memory = np.stack([self._at(position) for position in range(count)])  # [position, 2, kv_heads, head_dim]
        memory = np.ascontiguousarray(memory.transpose(2, 0, 1, 3)[heads])
        attention = self._attention
        options = (rows.start, attention.window, attention.scale, None)
        self._kernels.ops.attention(query, memory, *options, out, None, rows.parents, sinks=sinks, wide=rows.wide)

    def commit(self, start: int, path: Sequence[int]) -> None:
        for place, row in enumerate(path):
            self._at(start + place)[:] = self._at(start + row)

    def restart(self, first: int = 0) -> None:
        """Nothing to do."""

    def read_page(self, begin: int, heads: slice, out: np.ndarray) -> None:
        for i in range(out.shape[1]):
            out[:, i] = self._at(begin + i).swapaxes(0, 1)[heads]

    def write_page(self, begin: int, heads: slice, page: np.ndarray) -> None:
        for i in range(page.shape[1]):
            self._at(begin + i)[:, heads] = page[:, i].swapaxes(0, 1)

    def truncate(self, length: int, top: int) -> int:
        """Nothing but whole pages is gone on from."""
        return length // PAGE * PAGE

    def _at(self, position: int) -> np.ndarray:
        return self._pages[position // PAGE][position % PAGE]


@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
@pytest.mark.parametrize(("share", "draft"), [(1.0, 1), (0.3, 8)])
def test_a_new_store_needs_no_other_change(tmp_path, family, share, draft):
    _, checkpoint = tiny_checkpoint(family, tmp_path / "checkpoint", seed=3)
    packed = make_pack(checkpoint, tmp_path / "pack", Codec.F32)
    prompt = np.random.default_rng(7).integers(3, VOCAB, 23).tolist() * 2
    found = []
    for runtime in (CpuRuntime(2), CpuRuntime(2, kv_kinds=(PagedStore,))):
        with tiny_engine(packed, share, runtime, chunk=16, max_draft_tokens=draft) as engine:
            texts = []
            for reuse in (False, True):  # the second cuts back to a whole page
                generation = engine.generate(prompt, 40, ignore_eos=True, reuse=reuse)
                list(generation)
                texts.append(generation.report.token_ids)
            assert texts[0] == texts[1]
            found.append((texts, engine.plan.owners["KV"]))
    assert found[0][0] == found[1][0]
    assert found[1][1] > found[0][1], "96 positions are not whole pages: the plan asked the new store"
    assert PagedStore.opened
