"""Calibration of tiny models, and what sparse mode promises: bounded loss, the same bits whatever is resident."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from flashrt.budget import planner
from flashrt.calibration import pipeline, windows
from flashrt.calibration.channel_pack import ChannelPackSource
from flashrt.calibration.divergence import Divergence
from flashrt.calibration.fit_channels import ChannelFit
from flashrt.calibration.methods import method_for
from flashrt.calibration.pipeline import Request, calibrate
from flashrt.calibration.work_dir import WORK_DIR
from flashrt.engine.open import open_model, sparse_pack
from flashrt.engine.options import LoadOptions
from flashrt.errors import DiskError, PackError, UnsupportedModelError, UsageError
from flashrt.sparsity import SINKS, ChannelSparsity, Sparsity
from flashrt.storage.manifest import MANIFEST_FILE, SPARSE_DIR, Manifest
from flashrt.storage.pack import Pack
from flashrt.storage.packer import pack
from flashrt_kernels import ops
from flashrt_kernels.rows import Codec, align
from tests.engine.support import (
    check_a_thinned_tree,
    killed_once_at_every_stage,
    logits_of,
    make_pack,
    relative_rms,
    tiny_engine,
)
from tests.families import VOCAB, tiny_checkpoint

REQUEST = Request(max_loss=0.3, tokens=768)


def quiet(stage, done, total):
    pass


def calibrated(path, cache, request=REQUEST, progress=quiet):
    return calibrate(path, LoadOptions(cache_dir=cache, threads=2), request, progress)


@pytest.fixture(scope="module", params=["qwen2", "gemma3", "opt"])
def case(request, tmp_path_factory):
    """(pack's path, sparsity) of a gated, a sandwiched and an ungated family."""
    root = tmp_path_factory.mktemp(request.param)
    overrides = {"activation_function": "gelu"} if request.param == "opt" else {}  # ReLU is thinned out by row
    _, checkpoint = tiny_checkpoint(request.param, root / "checkpoint", seed=3, **overrides)
    make_pack(checkpoint, root / "pack", Codec.INT4)
    return root / "pack", calibrated(root / "pack", root / "cache")


@pytest.mark.parametrize("family", ["olmo2", "cohere"])
def test_blocks_without_a_norm_of_their_own_are_calibrated(family, tmp_path):
    _, checkpoint = tiny_checkpoint(family, tmp_path / "checkpoint", seed=3)
    make_pack(checkpoint, tmp_path / "pack", Codec.INT4)
    sparsity = calibrated(tmp_path / "pack", tmp_path / "cache")
    assert sparsity.held_out_loss <= REQUEST.max_loss
    prompt = np.random.default_rng(5).integers(3, VOCAB, 21).tolist()
    found = []
    for share in (0.2, 1.0):
        with tiny_engine(Pack(tmp_path / "pack" / SPARSE_DIR), share, chunk=16) as engine:
            found.append(logits_of(engine, prompt, prompt[:9]))
    assert np.array_equal(*found)


@pytest.fixture
def tokens():
    return np.random.default_rng(5).integers(3, VOCAB, 61).tolist()


def with_thresholds(engine, **thresholds):
    channels = engine.runner.decoder.sparse
    channels.restart([replace(layer, **thresholds) for layer in channels.layers])
    return engine


def test_the_loss_is_kept_and_something_is_left_out(case):
    path, sparsity = case
    assert 0 <= sparsity.held_out_loss <= REQUEST.max_loss
    assert sparsity.figures["bytes"] < 0.97
    assert len(sparsity.figures["layers"]) == len(sparsity.layers)
    opened = sparse_pack(Pack(path), REQUEST.max_loss)
    assert opened.manifest.sparsity == sparsity
    opened.verify()
    assert not (path / WORK_DIR).exists()


@pytest.mark.parametrize("prompt_tokens", [29, 9])
def test_results_depend_neither_on_the_budget_nor_on_the_batch(case, tokens, prompt_tokens):
    packed = Pack(case[0] / SPARSE_DIR)
    prompt, rest = tokens[:prompt_tokens], tokens[29:]
    results = []
    for share in (0.2, 0.6, 1.0):
        with tiny_engine(packed, share, chunk=16, logit_rows=16) as engine:
            assert engine.plan.resident == (share == 1)
            results.append(logits_of(engine, prompt, rest))
            engine.sequence.rewind(0)
            engine.runner.prefill(engine.sequence, prompt)
            batched = np.concatenate(
                [engine.runner.step_batch(engine.sequence, rest[i : i + 16]).copy() for i in range(0, len(rest), 16)]
            )
            assert np.array_equal(batched, results[-1][1:])
    assert np.array_equal(results[0], results[2])
    assert np.array_equal(results[1], results[2])


def test_a_tree_leaves_out_what_its_paths_do(case, tokens):
    path, _ = case
    with tiny_engine(sparse_pack(Pack(path), REQUEST.max_loss), 0.4, chunk=16, logit_rows=16) as engine:
        check_a_thinned_tree(engine, tokens)


def test_with_everything_stored_and_let_through_it_is_the_exact_model(case, tokens, tmp_path):
    """The same int4 weights, code for code; sums come in another order."""
    base = Pack(case[0])
    spec = base.spec
    whole = tuple(ChannelSparsity(32, -1.0, -1.0, -1.0) for _ in spec.layers)
    rng = np.random.default_rng(7)

    def shuffled(i):
        places = np.arange(align(spec.hidden, 64), dtype=np.int32).reshape(-1, 32)
        norms = np.ones(spec.hidden, np.float32), np.ones(spec.layers[i].ffn.neurons, np.float32)
        return ChannelFit(rng.permuted(places, axis=1).reshape(-1), *norms, [], [])

    source = ChannelPackSource(base, shuffled, whole)
    sparsity = Sparsity(base.manifest.hash, 0.0, 0.0, whole)
    block_bytes = base.manifest.block_bytes
    pack(source, tmp_path / "whole", Codec.INT4, block_bytes=block_bytes, encoder=source, sparsity=sparsity)
    results = []
    for path in (case[0], tmp_path / "whole", case[0] / SPARSE_DIR):
        with tiny_engine(Pack(path), 1.0) as engine:
            results.append(logits_of(engine, tokens[:9], tokens[9:]))
    exact, everything, thinned = results
    # Sums that differ in their last bits round some 8-bit activation the other way sooner or later: then it is a step.
    assert min(map(relative_rms, everything, exact)) < 3e-5
    assert relative_rms(everything, exact) < 2e-2
    assert relative_rms(thinned, exact) > 2 * relative_rms(everything, exact)


def test_what_is_sampled_does_not_depend_on_the_length_of_a_pass(case, tmp_path, monkeypatch):
    copy = tmp_path / "pack"
    shutil.copytree(case[0], copy, ignore=shutil.ignore_patterns(SPARSE_DIR))
    monkeypatch.setattr(planner, "CHUNKS", (16,))
    assert calibrated(copy, tmp_path / "cache") == case[1]


def test_windows_of_a_text_begin_as_texts_do(case):
    with tiny_engine(Pack(case[0]), 1.0) as engine:
        prefix = engine.tokenizer.encode("")
        pieces = windows.cut(engine.tokenizer, "the ring " * 900, 128, 768)
    assert prefix
    assert len(pieces) == 6
    assert all(len(piece) == 128 and piece[: len(prefix)] == prefix for piece in pieces)


def test_killed_at_any_stage_it_goes_on(case, tmp_path):
    path, sparsity = case
    copy = tmp_path / "pack"
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns(SPARSE_DIR))
    found, seen = killed_once_at_every_stage(copy, tmp_path / "cache", REQUEST)
    assert {"writing text", "sampling", "predicting", "fitting", "weighing", "choosing"} <= set(seen)
    assert found == sparsity


def test_every_sample_counts(tmp_path):
    _, checkpoint = tiny_checkpoint("qwen2", tmp_path / "checkpoint", seed=3)
    path = tmp_path / "pack"
    make_pack(checkpoint, path, Codec.INT4)
    text = [np.random.default_rng(i).integers(3, 120, 128).tolist() for i in range(6)]
    found = []
    for changed in (None, 1, 3, 5, 2):  # fitted to, but for 2, which the result is checked on
        copy = tmp_path / f"pack-{changed}"
        shutil.copytree(path, copy)
        pieces = [w[::-1] if i == changed else w for i, w in enumerate(text)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline._Calibration, "_windows", lambda self, engine, pieces=pieces: pieces)
            found.append(calibrated(copy, tmp_path / "cache"))
    for other in found[1:]:
        assert other.layers != found[0].layers or other.held_out_loss != found[0].held_out_loss


def test_text_that_is_given_counts_by_its_own_loss(case, tmp_path, monkeypatch):
    path, sparsity = case
    assert sparsity.held_out_loss == pytest.approx(np.expm1(sparsity.figures["held_out_kl"]))
    copy, text = tmp_path / "pack", "".join(np.random.default_rng(2).choice([*"abcdefgh "], 800))
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns(SPARSE_DIR))
    monkeypatch.setattr(Divergence, "rise", property(lambda found: found.loss + 0.1))
    given = calibrated(copy, tmp_path / "cache", replace(REQUEST, text=text))
    assert given.held_out_loss == pytest.approx(np.expm1(given.figures["held_out_kl"]) + 0.1)


def test_another_packs_calibration_is_refused(case, tmp_path):
    path, _ = case
    _, checkpoint = tiny_checkpoint("qwen2", tmp_path / "checkpoint", seed=4)
    make_pack(checkpoint, tmp_path / "other", Codec.INT4)
    shutil.copytree(path / SPARSE_DIR, tmp_path / "other" / SPARSE_DIR)
    with pytest.raises(PackError, match="calibrated for another pack"):
        sparse_pack(Pack(tmp_path / "other"))


def test_another_versions_calibration_is_refused(case, tmp_path):
    path, _ = case
    copy = tmp_path / "pack"
    shutil.copytree(path, copy)
    manifest_path = copy / SPARSE_DIR / MANIFEST_FILE
    manifest = Manifest.from_bytes(manifest_path.read_bytes(), "")
    newer = replace(manifest, sparsity=replace(manifest.sparsity, version=99))
    manifest_path.write_bytes(newer.to_bytes())
    with pytest.raises(PackError, match="version 99"):
        sparse_pack(Pack(copy))


def test_what_cannot_be_calibrated_is_refused(case, tmp_path):
    path, _ = case
    with pytest.raises(UsageError, match="name .* and --mode sparse"):
        open_model(path / SPARSE_DIR, LoadOptions())
    with pytest.raises(UsageError, match="is a calibrated one"):
        calibrated(path / SPARSE_DIR, tmp_path)
    with pytest.raises(UsageError, match="flashrt calibrate"):
        sparse_pack(Pack(path), max_loss=0.01)
    _, checkpoint = tiny_checkpoint("llama", tmp_path / "checkpoint")
    make_pack(checkpoint, tmp_path / "int8", Codec.INT8)
    with pytest.raises(UsageError, match="is not calibrated: run"):
        sparse_pack(Pack(tmp_path / "int8"))
    with pytest.raises(UnsupportedModelError, match="--dtype int4"):
        calibrated(tmp_path / "int8", tmp_path)
    with pytest.raises(UsageError, match="more than 0"):
        Request(max_loss=0)
    with pytest.raises(UsageError, match="has 5 tokens"):
        calibrated(path, tmp_path, replace(REQUEST, text="abcde"))


def test_a_full_disk_leaves_the_pack_as_it_was(case, tmp_path, monkeypatch):
    copy = tmp_path / "pack"
    shutil.copytree(case[0], copy, ignore=shutil.ignore_patterns(SPARSE_DIR))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(DiskError, match="needs"):
        calibrated(copy, tmp_path / "cache")
    assert not (copy / SPARSE_DIR).exists()


def test_two_at_once_are_refused(case, tmp_path):
    copy = tmp_path / "pack"
    shutil.copytree(case[0], copy, ignore=shutil.ignore_patterns(SPARSE_DIR))

    def second(stage, done, total):
        with pytest.raises(UsageError, match="another process is calibrating"):
            calibrated(copy, tmp_path / "cache")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrated(copy, tmp_path / "cache", progress=second)


def test_the_figures_are_json(case):
    json.dumps(case[1].to_json())


def test_the_first_tokens_leave_nothing_out(case, tokens):
    with tiny_engine(Pack(case[0] / SPARSE_DIR), 1.0) as engine:
        found = logits_of(engine, tokens[:1], tokens[1:9])
        shares = engine.runner.decoder.sparse.mean_shares()
        with_thresholds(engine, coarse_from=-1.0, fine_from=-1.0, neurons_from=-1.0)
        everything = logits_of(engine, tokens[:1], tokens[1:9])
    assert np.array_equal(found[:SINKS], everything[:SINKS])
    assert not np.array_equal(found[SINKS], everything[SINKS])
    assert shares["rows"] < 1


def test_gates_with_biases_are_refused(tmp_path):
    packed = make_pack(tiny_checkpoint("llama-bias", tmp_path / "checkpoint", seed=3)[1], tmp_path / "pack", Codec.INT4)
    with pytest.raises(UnsupportedModelError, match="gates with biases: use --mode exact"):
        method_for(packed, ops.load("cpu"))
