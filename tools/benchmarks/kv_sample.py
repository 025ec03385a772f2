"""Keys and values of a real text, recorded once, and caches of any length filled with them.

A cache is filled run by run: neighbouring positions of the text, put elsewhere. So keys and values keep what is theirs
in every layer, head and channel (means, variances, how channels and neighbours go together), and a key stands at its
new position: moved by n positions, it is rotated by n. The first positions are the text's own, attention sinks
included. Queries are the model's, which decodes behind all this.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.budget.plan import Workload
from flashrt.engine.engine import Engine
from flashrt.engine.open import open_model
from flashrt.engine.options import LoadOptions
from flashrt.engine.sequence import Sequence
from flashrt.kv.base import Kernels, KvLimits, Tensor
from flashrt.kv.cache import open_cache
from flashrt.kv.contiguous import ContiguousStore
from flashrt.spec import Attention
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.limits import ATTENTION_SEGMENT

SINKS = 16  # first positions, which are not put elsewhere

Array = np.ndarray


class KvSample:
    """What `record` left in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tokens: list[int] = np.load(folder / "tokens.npy").tolist()

    def layer(self, i: int) -> Array:
        """Keys (rotated as their positions say) and values of a layer, float32 [kv_heads, tokens, 2, head_dim]."""
        return np.asarray(np.load(self._folder / f"{i}.npy"))


def record(pack: Path, text: str, count: int, folder: Path) -> None:
    """Keep keys and values of the first `count` tokens of a text: in files, as they count against no budget there."""
    model = open_model(pack, LoadOptions(speculate="off"))
    if model.spec.delta_nets:
        raise SystemExit(f"{pack} has recurrent layers, whose states cannot be filled without computing")
    ids = model.tokenizer.encode(text)[:count]
    if len(ids) <= SINKS + ATTENTION_SEGMENT:
        raise SystemExit(f"the text has {len(ids)} tokens, expected more than {SINKS + ATTENTION_SEGMENT}")
    stores: list[ContiguousStore] = []

    class Kept(ContiguousStore):
        """All positions, also of layers that see a window."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            stores.append(self)

    with model.load(Workload(len(ids) + 1, prompt=len(ids))) as engine:
        work, limits = engine.runner.decoder.work, KvLimits(len(ids), len(ids), codec=KvCodec.F32)
        kernels = Kernels(work.ops, work.scratch)
        cache = open_cache(engine.spec, limits, kernels, np.zeros, [Kept])
        engine.runner.prefill(Sequence(cache), ids)
    for i, store in enumerate(stores):
        np.save(folder / f"{i}.npy", store.memory)
    np.save(folder / "tokens.npy", ids)


def fill(engine: Engine, sample: KvSample, length: int, seed: int = 0) -> None:
    """Make the engine's sequence hold `length` tokens that it never computed, by nothing but what stores are for."""
    sequence, make = engine.sequence, engine.runner.decoder.device.make
    attentions = [layer.attention for layer in engine.spec.layers]
    sequence.rewind(0)
    runs = list(_runs(len(sample.tokens), length, min(ATTENTION_SEGMENT, engine.plan.prefill_chunk), seed))
    for i, (store, attention) in enumerate(zip(sequence.kv.stores, attentions, strict=True)):
        recorded = sample.layer(i)
        for start, source, count in runs:
            part = recorded[:, source : source + count].swapaxes(0, 1)
            key, value = (make(part[:, :, which].copy()) for which in (0, 1))
            _move(engine, attention, key, start - source)
            store.append(key, value, start)
    for _, source, count in runs:
        sequence.extend(sample.tokens[source : source + count])


def _runs(recorded: int, length: int, longest: int, seed: int) -> Iterator[tuple[int, int, int]]:
    """(start, source, count): where a run stands in the cache, where in the recorded text, and its positions."""
    choice = np.random.default_rng(seed)
    for start in range(0, length, longest):
        count = min(longest, length - start)
        own = start + count <= recorded
        yield start, start if own else int(choice.integers(SINKS, recorded - count + 1)), count


def _move(engine: Engine, attention: Attention, key: Tensor, by: int) -> None:
    """Rotate keys, float32 [T, kv_heads, head_dim], to positions that lie `by` further."""
    if attention.rope is None or by == 0:
        return
    angles = by * np.asarray(attention.rope.inverse_frequencies(attention.head_dim), np.float64)
    decoder, turns = engine.runner.decoder, (np.cos(angles), np.sin(angles))
    cos, sin = (decoder.device.make(np.tile(turn.astype(np.float32), (len(key), 1))) for turn in turns)
    decoder.work.ops.rope(key, cos, sin)
