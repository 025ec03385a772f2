"""A tree of tokens in one pass: the bits of its paths, one by one, and the sequence that goes on with one of them."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.errors import UsageError
from flashrt_kernels.rows import Codec
from tests.engine.support import TorchRuntime, back_to, held_of, make_pack, relative_rms, tiny_engine
from tests.families import FAMILIES, VOCAB, tiny_checkpoint

# Longer than the windows of some families; the second node of a level does not lie beside its parent.
PARENTS = [-1, -1, 0, 0, 1, 2, 2, 5, 7, 8, 9, 3, 10, 12, 4, 13]
PROMPT = 21


def paths(parents):
    """For each token of a tree, those that it follows and itself."""
    result = []
    for i, parent in enumerate(parents):
        result.append([*(result[parent] if parent >= 0 else []), i])
    return result


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(pack, prompt, tokens of a tree) of one family."""
    root = tmp_path_factory.mktemp(request.param)
    _, checkpoint = tiny_checkpoint(request.param, root / "checkpoint", seed=3)
    packed = make_pack(checkpoint, root / "pack", Codec.INT4)
    random = np.random.default_rng(7)
    return packed, random.integers(3, VOCAB, PROMPT).tolist(), random.integers(3, VOCAB, len(PARENTS)).tolist()


def along_paths(engine, prompt, tokens, parents):
    """The logits of a tree's tokens, each after its own path in a pass of its own."""
    rows = []
    engine.runner.prefill(engine.sequence, prompt)
    for path in paths(parents):
        back_to(engine, prompt)
        rows.append(engine.runner.step_batch(engine.sequence, [tokens[i] for i in path])[-1].copy())
    return np.stack(rows)


def test_a_tree_has_the_bits_of_its_paths(case):
    packed, prompt, tokens = case
    with tiny_engine(packed, 1.0, chunk=16, logit_rows=16) as engine:
        expected = along_paths(engine, prompt, tokens, PARENTS)
    for share in (0.2, 0.6, 1.0):
        with tiny_engine(packed, share, chunk=16, logit_rows=16) as engine:
            engine.runner.prefill(engine.sequence, prompt)
            for count in (1, 3, 7, 16):
                assert np.array_equal(
                    engine.runner.step_tree(engine.sequence, tokens[:count], PARENTS[:count]), expected[:count]
                )
                assert engine.sequence.length == PROMPT


def test_keeping_a_path_is_decoding_it(case):
    packed, prompt, tokens = case
    path = paths(PARENTS)[-1]
    with tiny_engine(packed, 0.3, chunk=16, logit_rows=16) as engine:
        engine.runner.prefill(engine.sequence, prompt)
        wanted = {0: held_of(engine)}
        for i in path:
            engine.runner.step(engine.sequence, tokens[i])
            wanted[engine.sequence.length - PROMPT] = held_of(engine)
        logits = engine.runner.step(engine.sequence, 5)
        for kept in (path, path[:1], []):
            back_to(engine, prompt)
            engine.runner.step_tree(engine.sequence, tokens, PARENTS)
            engine.sequence.commit(kept)
            assert engine.sequence.length == PROMPT + len(kept)
            for found, expected in zip(held_of(engine), wanted[len(kept)], strict=True):
                assert np.array_equal(found, expected)
        engine.runner.step_tree(engine.sequence, tokens, PARENTS)
        engine.sequence.commit(path)
        assert np.array_equal(engine.runner.step(engine.sequence, 5), logits)
        if not engine.sequence.kv.recurrent:  # which cannot be cut back by one token: a wide pass computes the last 17
            again = engine.runner.prefill(engine.sequence, [*prompt, *(tokens[i] for i in path), 5])
            assert np.array_equal(again, logits)


@pytest.mark.parametrize("family", ["gemma3", "opt", "qwen3_moe", "qwen3_5_text", "deepseek_v3"])
def test_the_reference_agrees(tmp_path, family):
    _, checkpoint = tiny_checkpoint(family, tmp_path / "checkpoint", seed=3)
    packed = make_pack(checkpoint, tmp_path / "pack", Codec.F32)
    random = np.random.default_rng(7)
    prompt, tokens = random.integers(3, VOCAB, 29).tolist(), random.integers(3, VOCAB, len(PARENTS)).tolist()
    found = []
    for runtime in (None, TorchRuntime()):
        with tiny_engine(packed, 0.4, runtime, chunk=32, logit_rows=16) as engine:
            engine.runner.prefill(engine.sequence, prompt)
            logits = engine.runner.step_tree(engine.sequence, tokens, PARENTS).copy()
            engine.sequence.commit([1, 4, 14])
            found.append(np.concatenate((logits, engine.runner.step(engine.sequence, 5)[None])))
    assert relative_rms(found[0], found[1]) < 1e-4


def test_what_is_no_tree_or_path_is_refused(case):
    packed, prompt, tokens = case
    with tiny_engine(packed, 0.3, chunk=16, logit_rows=16) as engine:
        engine.runner.prefill(engine.sequence, prompt)
        for count, parents in ((2, [-1]), (2, [-1, 1]), (1, [-2]), (0, [])):
            with pytest.raises(UsageError):
                engine.runner.step_tree(engine.sequence, tokens[:count], parents)
        with pytest.raises(ValueError, match="not a path"):
            engine.sequence.commit([0])
        engine.runner.step_tree(engine.sequence, tokens, PARENTS)
        for path in ([2], [0, 4], [0, 2, 16], [-1], [0, 0]):
            with pytest.raises(ValueError, match="not a path"):
                engine.sequence.commit(path)
        engine.sequence.commit([0, 2])
        with pytest.raises(ValueError, match="not a path"):
            engine.sequence.commit([0])
        engine.runner.step_tree(engine.sequence, tokens, PARENTS)
        engine.sequence.rewind(PROMPT)
        with pytest.raises(ValueError, match="not a path"):
            engine.sequence.commit([0])
