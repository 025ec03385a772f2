"""Attention heads that are predicted: bounded loss, nothing of a head left out, the same bits in any company."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from flashrt.calibration import fit_heads
from flashrt.calibration.evaluation import Reference, figures, select
from flashrt.calibration.fit_heads import EVERYTHING
from flashrt.calibration.pipeline import Request, calibrate
from flashrt.engine.options import LoadOptions
from flashrt.errors import PackError
from flashrt.model.heads import computed_rows, runs
from flashrt.sparsity import SINKS
from flashrt.spec import Attention
from flashrt.storage.manifest import SPARSE_DIR
from flashrt.storage.pack import Pack
from flashrt_kernels.limits import NARROW_TOKENS
from flashrt_kernels.rows import Codec
from tests.engine.support import killed_once_at_every_stage, logits_of, make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint

REQUEST = Request(max_loss=0.9, tokens=1280)
FAMILIES = {
    "opt": {"num_attention_heads": 9, "ffn_dim": 300},  # one bundle of queries a head
    "llama": {"num_key_value_heads": 6, "head_dim": 24, "intermediate_size": 300, "hidden_act": "relu"},  # rotated
}


def quiet(stage, done, total):
    pass


def calibrated(path, cache):
    return calibrate(path, LoadOptions(cache_dir=cache, threads=2), REQUEST, quiet)


@pytest.fixture(scope="module", params=[("opt", Codec.INT8), ("llama", Codec.INT4)], ids=["opt-int8", "llama-int4"])
def case(request, tmp_path_factory):
    """(pack's path, sparsity), calibrated as if it cost nothing to compute heads apart."""
    family, codec = request.param
    root = tmp_path_factory.mktemp(family)
    _, checkpoint = tiny_checkpoint(family, root / "checkpoint", seed=3, **FAMILIES[family])
    make_pack(checkpoint, root / "pack", codec)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SPLIT_BYTES", "RUN_BYTES"):
            patch.setattr(fit_heads, name, 0)
        return root / "pack", calibrated(root / "pack", root / "cache")


@pytest.fixture
def tokens():
    return np.random.default_rng(5).integers(3, VOCAB, 61).tolist()


def with_heads_from(engine, threshold):
    """Another threshold, in the layers that have a predictor."""
    rows = engine.runner.decoder.sparse
    rows.restart([replace(x, heads_from=threshold if x.heads_from is not None else None) for x in rows.layers])
    return engine


def attended(engine, prompt, batch):
    """What the heads of every layer give for a pass of `batch` after `prompt`: layer → float32 [B, heads, head_dim]."""
    found = {}

    def observe(kind, i, residual, values):
        if kind == "heads":
            found[i] = values.reshape(len(values), engine.spec.layers[i].attention.heads, -1).copy()

    engine.sequence.rewind(0)
    engine.runner.prefill(engine.sequence, prompt)
    with engine.runner.decoder.observing(observe):
        engine.runner.step_batch(engine.sequence, batch)
    return found


def test_the_loss_is_kept_and_heads_are_left_out(case):
    path, sparsity = case
    assert 0 <= sparsity.held_out_loss <= REQUEST.max_loss
    assert sparsity.figures["heads"] < 0.98
    assert any(layer.heads_from is not None for layer in sparsity.layers)
    opened = Pack(path / SPARSE_DIR)
    assert opened.manifest.sparsity == sparsity
    opened.verify()


def test_results_depend_neither_on_the_budget_nor_on_the_batch(case, tokens):
    packed = Pack(case[0] / SPARSE_DIR)
    prompt, rest = tokens[:9], tokens[29:]
    results = []
    for share in (0.0, 0.1, 1.0):
        with tiny_engine(packed, share, chunk=16, logit_rows=16) as engine:
            results.append(logits_of(engine, prompt, rest))
            assert engine.runner.decoder.sparse.mean_shares()["heads"] < 1
            engine.sequence.rewind(0)
            engine.runner.prefill(engine.sequence, prompt)
            batched = np.concatenate(
                [engine.runner.step_batch(engine.sequence, rest[i : i + 16]).copy() for i in range(0, len(rest), 16)]
            )
            assert np.array_equal(batched, results[-1][1:])
    for other in results[1:]:
        assert np.array_equal(other, results[0])


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_with_every_head_chosen_nothing_changes(case, tokens, share):
    packed = Pack(case[0] / SPARSE_DIR)
    with tiny_engine(packed, share) as engine:
        thinned = logits_of(engine, tokens[:9], tokens[9:])
        everything = logits_of(with_heads_from(engine, EVERYTHING), tokens[:9], tokens[9:])
        assert engine.runner.decoder.sparse.mean_shares()["heads"] == 1
        exact = logits_of(with_heads_from(engine, None), tokens[:9], tokens[9:])
    assert np.array_equal(everything, exact)
    assert not np.array_equal(thinned, exact)


def test_a_head_left_out_gives_nothing_and_the_others_all(case, tokens):
    """In the first layer that predicts: up to there, passes are the same."""
    path, sparsity = case
    first = next(i for i, layer in enumerate(sparsity.layers) if layer.heads_from is not None)
    prompt, batch = tokens[:7], tokens[7:20]
    with tiny_engine(Pack(path / SPARSE_DIR), 0.3, logit_rows=NARROW_TOKENS) as engine:
        heads = engine.runner.decoder.sparse.blocks[first].heads
        chosen = []
        choose = heads.choose
        heads.choose = lambda *arguments: chosen.append(choose(*arguments)) or chosen[-1]
        found = attended(engine, prompt, batch)[first]
        cache = engine.sequence.kv.stores[first].memory[:, :20].copy()
        exact = attended(with_heads_from(engine, None), prompt, batch)[first]
        chosen = chosen[-1].each
        assert np.array_equal(cache, engine.sequence.kv.stores[first].memory[:, :20])  # no holes
    assert 0 < chosen.sum() < chosen.size
    assert exact.all()
    assert not found[~chosen].any()
    assert np.array_equal(found[chosen], exact[chosen])


def test_a_token_may_do_without_any_head(case, tokens):
    with tiny_engine(Pack(case[0] / SPARSE_DIR), 0.3, logit_rows=NARROW_TOKENS) as engine:
        with_heads_from(engine, -EVERYTHING)
        found = attended(engine, tokens[:7], tokens[7:20])
        exact = {i for i, layer in enumerate(case[1].layers) if layer.heads_from is None}
        assert all(values.any() == (i in exact) for i, values in found.items())


def test_the_first_tokens_leave_no_head_out(case, tokens):
    with tiny_engine(Pack(case[0] / SPARSE_DIR), 1.0) as engine:
        none = logits_of(with_heads_from(engine, -EVERYTHING), tokens[:1], tokens[1:9])
        exact = logits_of(with_heads_from(engine, None), tokens[:1], tokens[1:9])
    assert np.array_equal(none[:SINKS], exact[:SINKS])
    assert not np.array_equal(none[SINKS], exact[SINKS])


def test_heads_are_reported(case, tokens, tmp_path):
    windows = [tokens[:30], tokens[30:]]
    with tiny_engine(Pack(case[0]), 1.0, logit_rows=NARROW_TOKENS) as engine:
        assert generated(engine, tokens).ffn["heads_share"] is None
        reference = Reference(engine, windows, tmp_path, quiet)
    with reference, tiny_engine(Pack(case[0] / SPARSE_DIR), 1.0, logit_rows=NARROW_TOKENS) as engine:
        assert 0 < generated(engine, tokens).ffn["heads_share"] < 1
        result = figures(reference.divergence(engine, quiet), engine, select(engine, windows))
        assert 0 < result["heads_share"] < 1
        engine.runner.decoder.sparse.restart()
        attended(with_heads_from(engine, -EVERYTHING), tokens[:20], tokens[20:30])
        predicted = np.mean([layer.heads_from is not None for layer in case[1].layers])
        assert engine.runner.decoder.sparse.mean_shares()["heads"] == pytest.approx(1 - predicted)


def generated(engine, tokens):
    generation = engine.generate(tokens[:20], 12, ignore_eos=True)
    list(generation)
    return generation.report


def test_small_heads_do_not_pay(tmp_path):
    """What is saved of these is less than what it costs to compute heads apart."""
    _, checkpoint = tiny_checkpoint("opt", tmp_path / "checkpoint", seed=3, **FAMILIES["opt"])
    make_pack(checkpoint, tmp_path / "pack", Codec.INT8)
    sparsity = calibrated(tmp_path / "pack", tmp_path / "cache")
    assert all(layer.heads_from is None for layer in sparsity.layers)
    assert sparsity.figures["heads"] == 1
    assert not any("heads" in name for name in Pack(tmp_path / "pack" / SPARSE_DIR).layout.tensors)


def test_killed_at_any_stage_it_goes_on(case, tmp_path, monkeypatch):
    for name in ("SPLIT_BYTES", "RUN_BYTES"):
        monkeypatch.setattr(fit_heads, name, 0)
    path, sparsity = case
    copy = tmp_path / "pack"
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns(SPARSE_DIR))
    found, seen = killed_once_at_every_stage(copy, tmp_path / "cache", REQUEST)
    assert {"sampling", "fitting", "weighing"} <= seen
    assert found == sparsity


def test_runs_of_heads_are_rows_of_queries():
    chosen = np.array([[1, 0, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 1]], bool)
    assert runs(chosen) == [(0, 2), (3, 4), (6, 7)]
    assert runs(np.zeros((3, 7), bool)) == []
    assert runs(np.ones((1, 7), bool)) == [(0, 7)]
    rows = computed_rows(runs(chosen), Attention(7, 7, 24, 0.2))
    assert rows == [(0, 48), (72, 96), (144, 168), (168, 504)]


def test_heads_that_share_keys_are_not_predicted(tmp_path):
    _, checkpoint = tiny_checkpoint("llama-relu", tmp_path / "checkpoint", seed=3)
    packed = make_pack(checkpoint, tmp_path / "pack", Codec.INT4)
    sparsity = calibrated(tmp_path / "pack", tmp_path / "cache")
    assert sparsity.figures["heads"] == 1
    manifest = Pack(packed.path / SPARSE_DIR).manifest
    layers = tuple(replace(layer, heads_from=0.5) for layer in sparsity.layers)
    wrong = replace(manifest, sparsity=replace(sparsity, layers=layers))
    (packed.path / SPARSE_DIR / "manifest.json").write_bytes(wrong.to_bytes())
    with pytest.raises(PackError, match="cannot be computed one by one"):
        Pack(packed.path / SPARSE_DIR)
