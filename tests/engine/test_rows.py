"""Models whose neurons are predicted: bounded loss, the same bits whatever is in memory, exact when all are chosen."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from flashrt.budget.claims.rows import RowTier
from flashrt.calibration.evaluation import Reference, figures, select
from flashrt.calibration.fit_rows import EVERYTHING
from flashrt.calibration.pipeline import Request, calibrate
from flashrt.calibration.work_dir import WORK_DIR
from flashrt.engine.open import sparse_pack
from flashrt.engine.options import LoadOptions
from flashrt.model.ffn.dense import DenseKind
from flashrt.model.ffn.lookahead import Lookahead
from flashrt.storage.manifest import SPARSE_DIR
from flashrt.storage.pack import Pack
from flashrt_kernels.limits import NARROW_TOKENS
from flashrt_kernels.rows import Codec
from tests.engine.support import (
    check_a_thinned_tree,
    killed_once_at_every_stage,
    logits_of,
    make_pack,
    relative_rms,
    tiny_engine,
)
from tests.families import VOCAB, tiny_checkpoint

REQUEST = Request(max_loss=0.3, tokens=2048)
FAMILIES = {
    "opt": {"ffn_dim": 700},  # biases, no gate
    "llama": {"intermediate_size": 540, "hidden_act": "relu"},
}


def quiet(stage, done, total):
    pass


def calibrated(path, cache, request=REQUEST, progress=quiet):
    return calibrate(path, LoadOptions(cache_dir=cache, threads=2), request, progress)


@pytest.fixture(scope="module", params=[("opt", Codec.INT8), ("llama", Codec.INT4)], ids=["opt-int8", "llama-int4"])
def case(request, tmp_path_factory):
    """(pack's path, sparsity) of an ungated and a gated family."""
    family, codec = request.param
    root = tmp_path_factory.mktemp(family)
    _, checkpoint = tiny_checkpoint(family, root / "checkpoint", seed=3, **FAMILIES[family])
    make_pack(checkpoint, root / "pack", codec)
    return root / "pack", calibrated(root / "pack", root / "cache")


@pytest.fixture
def tokens():
    return np.random.default_rng(5).integers(3, VOCAB, 61).tolist()


@pytest.mark.parametrize("family", ["olmo2", "cohere"])
def test_blocks_without_a_norm_of_their_own(family, tokens, tmp_path):
    options, request = {"intermediate_size": 160, "hidden_act": "relu"}, replace(REQUEST, tokens=1280)
    _, checkpoint = tiny_checkpoint(family, tmp_path / "checkpoint", seed=3, **options)
    make_pack(checkpoint, tmp_path / "pack", Codec.INT8)
    assert calibrated(tmp_path / "pack", tmp_path / "cache", request).held_out_loss <= REQUEST.max_loss
    found = []
    for share in (0.2, 1.0):
        with tiny_engine(Pack(tmp_path / "pack" / SPARSE_DIR), share, chunk=16) as engine:
            found.append(logits_of(engine, tokens[:21], tokens[21:30]))
    assert np.array_equal(*found)


def everything(engine):
    """Let every neuron through."""
    rows = engine.runner.decoder.sparse
    rows.restart([replace(layer, threshold=EVERYTHING) for layer in rows.layers])
    return engine


def test_the_loss_is_kept_and_neurons_are_left_out(case):
    path, sparsity = case
    assert sparsity.method == "rows"
    assert 0 <= sparsity.held_out_loss <= REQUEST.max_loss
    assert sparsity.figures["rows"] < 0.95
    assert all(0.3 < layer["recall"] <= 1 and 0 < layer["precision"] <= 1 for layer in sparsity.figures["layers"])
    opened = sparse_pack(Pack(path), REQUEST.max_loss)
    assert opened.manifest.sparsity == sparsity
    opened.verify()
    assert not (path / WORK_DIR).exists()


@pytest.mark.parametrize("prompt_tokens", [29, 9])
def test_results_depend_neither_on_the_budget_nor_on_the_batch(case, tokens, prompt_tokens):
    packed = Pack(case[0] / SPARSE_DIR)
    prompt, rest = tokens[:prompt_tokens], tokens[29:]
    results, windows = [], []
    for share in (0.0, 0.1, 0.4, 1.0):
        with tiny_engine(packed, share, chunk=16, logit_rows=16) as engine:
            windows.append(sum(engine.plan.tier(RowTier).slots.values()))
            assert bool(windows[-1]) == (share < 1)
            results.append(logits_of(engine, prompt, rest))
            engine.sequence.rewind(0)
            engine.runner.prefill(engine.sequence, prompt)
            batched = np.concatenate(
                [engine.runner.step_batch(engine.sequence, rest[i : i + 16]).copy() for i in range(0, len(rest), 16)]
            )
            assert np.array_equal(batched, results[-1][1:])
            for cache in engine.runner.decoder.sparse._caches:
                cache.check_integrity()
    assert len(set(windows)) == 4
    for other in results[1:]:
        assert np.array_equal(other, results[0])


def test_a_tree_leaves_out_what_its_paths_do(case, tokens):
    path, _ = case
    with tiny_engine(sparse_pack(Pack(path), REQUEST.max_loss), 0.4, chunk=16, logit_rows=16) as engine:
        check_a_thinned_tree(engine, tokens)


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_with_every_neuron_chosen_it_is_exact_on_the_same_order(case, tokens, share):
    """The dense way through the calibrated pack, narrow passes included, is the reference."""
    packed = Pack(case[0] / SPARSE_DIR)
    with tiny_engine(packed, 1.0, kinds=(DenseKind,)) as engine:
        exact = logits_of(engine, tokens[:9], tokens[9:])
    with tiny_engine(packed, share) as engine:
        found = logits_of(everything(engine), tokens[:9], tokens[9:])
        assert engine.runner.decoder.sparse.mean_shares()["rows"] == 1
        engine.runner.decoder.sparse.restart(packed.manifest.sparsity.layers)
        thinned = logits_of(engine, tokens[:9], tokens[9:])
        assert engine.runner.decoder.sparse.mean_shares()["rows"] < 1
    assert np.array_equal(found, exact)
    assert not np.array_equal(thinned, exact)
    with tiny_engine(Pack(case[0]), 1.0) as engine:
        assert (
            relative_rms(found, logits_of(engine, tokens[:9], tokens[9:])) < 2e-2
        )  # factors are rounded in other groups


def test_a_pass_that_fails_leaves_nothing_behind(case, tokens):
    packed = Pack(case[0] / SPARSE_DIR)
    with tiny_engine(packed, 0.1) as engine:
        expected = logits_of(engine, tokens[:9], tokens[9:])
        cache = engine.runner.decoder.sparse._caches[1]
        ensure = cache.ensure

        def interrupted(rows):
            yield next(ensure(rows))
            raise KeyboardInterrupt

        cache.ensure = interrupted
        with pytest.raises(KeyboardInterrupt):
            engine.runner.step(engine.sequence, 5)
        cache.ensure = ensure
        assert np.array_equal(logits_of(engine, tokens[:9], tokens[9:]), expected)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 1.0])
def test_results_do_not_depend_on_guesses(case, tokens, share, monkeypatch):
    packed, results = Pack(case[0] / SPARSE_DIR), {}
    for guessing in (False, True):
        monkeypatch.setattr(Lookahead, "begin", lambda self, guessing=guessing: began(self, guessing))
        with tiny_engine(packed, share) as engine:
            results[guessing] = logits_of(engine, tokens[:9], tokens[9:])
            rows = engine.runner.decoder.sparse
            caches = rows._caches
            for cache in caches:
                cache.check_integrity()
            assert any(cache.statistics.useful > 0 for cache in caches) == (guessing and share < 1)
            read = sum(cache.statistics.misses + cache.statistics.useful for cache in caches)
            assert rows.hit_rate() == 1 - read / sum(block.tally.neurons for block in rows.blocks.values())
    assert np.array_equal(results[False], results[True])


def began(ahead, guessing):
    """Guess for every token, or for none."""
    ahead._guessing = guessing
    return guessing


def test_a_guess_that_nobody_came_for(case, tokens, monkeypatch):
    """A pass that is left during attention, while guessed rows are being read."""
    monkeypatch.setattr(Lookahead, "begin", lambda self: began(self, True))
    packed = Pack(case[0] / SPARSE_DIR)
    with tiny_engine(packed, 0.1) as engine:
        expected = logits_of(engine, tokens[:9], tokens[9:])
        attention = engine.runner.decoder._mix

        def interrupted(i, *rest):
            if i == 1:
                raise KeyboardInterrupt
            attention(i, *rest)

        engine.runner.decoder._mix = interrupted
        for token in tokens[:5]:
            with pytest.raises(KeyboardInterrupt):
                engine.runner.step(engine.sequence, token)
            engine.runner.decoder.sparse._caches[1].check_integrity()
        engine.runner.decoder._mix = attention
        assert np.array_equal(logits_of(engine, tokens[:9], tokens[9:]), expected)


def test_reads_are_counted(case, tokens):
    packed = Pack(case[0] / SPARSE_DIR)
    with tiny_engine(packed, 0.1) as engine:
        assert engine.runner.decoder.sparse.hit_rate() is None
        report = generated(engine, tokens)
    assert 0 < report.ffn["row_hit_rate"] < 1
    assert 0 < report.ffn["ffn_rows_share"] < 1
    assert report.ffn["ffn_bytes_share"] > report.ffn["ffn_rows_share"]
    assert report.bytes_read_per_token > 0
    with tiny_engine(packed, 1.0) as engine:
        assert generated(engine, tokens).ffn["row_hit_rate"] == 1
    with tiny_engine(Pack(case[0]), 1.0) as engine:
        assert generated(engine, tokens).ffn["row_hit_rate"] is None


def generated(engine, tokens):
    generation = engine.generate(tokens[:20], 12, ignore_eos=True)
    list(generation)
    return generation.report


def test_quality_compares_with_what_is_really_active(case, tokens, tmp_path):
    windows = [tokens[:30], tokens[30:]]
    with tiny_engine(Pack(case[0]), 1.0, logit_rows=NARROW_TOKENS) as engine:
        reference = Reference(engine, windows, tmp_path, quiet)
    with reference, tiny_engine(Pack(case[0] / SPARSE_DIR), 0.2, logit_rows=NARROW_TOKENS) as engine:
        result = figures(reference.divergence(engine, quiet), engine, select(engine, windows))
        assert result["method"] == "rows"
        assert 0.1 < result["recall"] < 1  # of neurons: those that hardly matter count as much as others
        assert 0.6 < result["precision"] <= 1
        assert 0 < result["predictor_bytes_share"] < result["ffn_bytes_share"]
        everything(engine)
        chosen = select(engine, windows)
    assert all(s.recall == 1 and 0.2 < s.precision < 0.9 for s in chosen)  # about half are active in a random model


def test_killed_at_any_stage_it_goes_on(case, tmp_path):
    path, sparsity = case
    copy = tmp_path / "pack"
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns(SPARSE_DIR))
    found, seen = killed_once_at_every_stage(copy, tmp_path / "cache", REQUEST)
    assert {"fitting", "weighing", "choosing"} <= set(seen)
    assert found == sparsity
