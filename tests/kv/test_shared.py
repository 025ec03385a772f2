"""Layers that attend to the keys and values of an earlier one: what they take, in memory, on disk and in sessions."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from flashrt.calibration.kv_pipeline import labelled_layers
from flashrt.errors import UnsupportedModelError
from flashrt.kv.base import KvLimits
from flashrt.kv.cache import KINDS, choose, far_layout, kv_bytes
from flashrt.kv.pages import Extent, Page, pages
from flashrt.kv.shared import SharedStore
from flashrt.spec import Attention, Ffn, Layer, ModelSpec
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.rows import Codec
from tests.engine.support import logits_of, make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint

FULL, SLIDING = Attention(6, 2, 36, 1.0), Attention(6, 2, 20, 1.0, window=7)
FFN = Ffn(64, "silu")


def spec_of(*mixers: Attention) -> ModelSpec:
    return ModelSpec("test", 131, 72, tuple(Layer(mixer, FFN) for mixer in mixers), context=4096)


OWN = spec_of(SLIDING, FULL)
SHARED = spec_of(SLIDING, FULL, *[replace(SLIDING, kv_from=0), replace(FULL, kv_from=1)] * 2)


@pytest.mark.parametrize("held", [None, 0, 3])
def test_they_take_no_memory_but_read_again_what_is_on_disk(held: int | None) -> None:
    limits = KvLimits(4096, 16, held=held)
    assert SHARED.unsupported() is None
    assert choose(SHARED.layers[3].mixer, limits, KINDS) == (SharedStore, 0)
    assert kv_bytes(SHARED, limits) == kv_bytes(OWN, limits)
    assert SHARED.kv_bytes_per_token(KvCodec.BF16) == OWN.kv_bytes_per_token(KvCodec.BF16)
    ours, theirs = far_layout(SHARED, limits), far_layout(OWN, limits)
    if held is None:
        assert ours is None
        return
    assert ours is not None
    assert theirs is not None
    assert ours.nbytes == theirs.nbytes
    assert ours.streamed_bytes == 3 * theirs.streamed_bytes > 0


def test_they_have_no_part_in_sessions() -> None:
    extent = Extent(0, 700, 700)
    ours, theirs = (list(pages([layer.mixer for layer in spec.layers], extent, KvCodec.BF16)) for spec in (SHARED, OWN))
    assert ours == theirs
    assert {page.layer for page in ours if isinstance(page, Page)} == {0, 1}


@pytest.mark.parametrize(
    ("mixers", "problem"),
    [
        ((FULL, replace(FULL, kv_from=1)), "layer 1 attends to what layer 1 keeps"),
        ((FULL, replace(SLIDING, kv_from=0)), "layer 1 attends to what layer 0 keeps"),
        ((FULL, replace(FULL, kv_from=0), replace(FULL, kv_from=1)), "layer 2 attends to what layer 1 keeps"),
        ((replace(FULL, kv_from=1), FULL), "layer 0 attends to what layer 1 keeps"),
    ],
)
def test_what_is_none_before_them_or_not_alike_is_refused(mixers: tuple[Attention, ...], problem: str) -> None:
    found = spec_of(*mixers).unsupported()
    assert found is not None
    assert found.startswith(problem)


def test_labels_of_their_keys_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="layers that attend to the keys of others cannot have labels"):
        labelled_layers(SHARED)


def test_keys_that_checkpoints_hold_of_them_are_left_unread(tmp_path: Path) -> None:
    """Published ones hold projections that nothing reads."""
    from safetensors.numpy import load_file, save_file

    from flashrt.storage.sources import open_checkpoint

    _, directory = tiny_checkpoint("gemma4-inputs", tmp_path / "checkpoint", seed=3)
    path = directory / "model.safetensors"
    names = ("k_proj.weight", "v_proj.weight", "k_norm.weight")
    unused = {f"model.layers.5.self_attn.{name}": np.ones((40, 72), np.float32) for name in names}
    stored = load_file(path)
    save_file(stored | unused, path, {"format": "pt"})
    with open_checkpoint(directory) as checkpoint:
        assert [attention.kv_from for attention in checkpoint.spec.attentions.values()] == [None] * 4 + [2, 3, 2]
        checkpoint.validate()
    save_file(stored | {"model.layers.5.self_attn.q_proj.bias": np.ones(120, np.float32)}, path, {"format": "pt"})
    with (
        open_checkpoint(directory) as checkpoint,
        pytest.raises(UnsupportedModelError, match="5.self_attn.q_proj.bias"),
    ):
        checkpoint.validate()


def test_a_sequence_that_is_cut_back_goes_on_as_if_it_had_not_been_longer(tmp_path: Path) -> None:
    options = {"max_position_embeddings": 4096}
    _, checkpoint = tiny_checkpoint("gemma4-inputs", tmp_path / "checkpoint", seed=3, **options)
    packed = make_pack(checkpoint, tmp_path / "pack", Codec.INT8)
    random = np.random.default_rng(6)
    text = random.integers(3, VOCAB, 1300).tolist()
    with tiny_engine(packed, 1.0, context=1500) as engine:
        expected = {end: logits_of(engine, text[:end], text[end : end + 3]) for end in (1190, 1188, 900, 60)}
        engine.runner.prefill(engine.sequence, text[:1300])
        for before, end in pairwise((1300, 1190, 1188, 900, 60)):
            kept = engine.sequence.kv.truncate(min(end - 20, before))
            engine.sequence.rewind(kept)
            engine.runner.prefill(engine.sequence, text[:end])
            rows = [engine.runner.step(engine.sequence, token).copy() for token in text[end : end + 3]]
            assert np.array_equal(np.stack(rows), expected[end][1:])
