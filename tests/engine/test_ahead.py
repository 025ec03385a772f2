"""Layers that predict further tokens: what they give, and that they change nothing but speed."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import flashrt
from flashrt.budget.plan import Workload
from flashrt.budget.planner import AHEAD
from flashrt.checkpoints.pack_job import move_checkpoint, pack_checkpoint
from flashrt.config import Sampling
from flashrt.engine.ahead_pack import ahead_bytes, ahead_pack, ahead_plan, load_ahead, pays
from flashrt.engine.engine import Engine
from flashrt.engine.open import open_model
from flashrt.engine.options import LoadOptions
from flashrt.engine.runtime import runtime_for
from flashrt.errors import CheckpointWarning, PackError, UsageError
from flashrt.storage.layout import AHEAD_DIR
from flashrt.storage.manifest import MANIFEST_FILE
from flashrt.storage.pack import Pack
from flashrt_kernels.kv import KvCodec
from tests.ahead import FAMILIES, AheadReference, ahead_checkpoint, ahead_gguf
from tests.engine.support import tiny_engine, tiny_plan
from tests.families import GGUF_FAMILIES, VOCAB

CONTEXT = 96


def packed(checkpoint: Path, out: Path, dtype: str = "f32") -> Pack:
    pack_checkpoint(checkpoint, out, dtype, out, lambda *_: None)
    return Pack(out)


def with_ahead(pack: Pack, share: float = 1.0, **options: object) -> Engine:
    engine = tiny_engine(pack, share, context=CONTEXT, **options)
    own = ahead_pack(pack)
    assert own is not None
    load_ahead(own, ahead_plan(own, engine.runtime, CONTEXT, KvCodec.F32), engine)
    return engine


def drafts(engine: Engine, token: int, steps: int) -> list[np.ndarray]:
    """Logits by depth, along the likeliest tokens."""
    result: list[np.ndarray] = []
    for depth in range(steps):
        result.append(engine.ahead.draft(token, depth).copy())
        token = int(result[-1].argmax())
    return result


def check(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for own, theirs in zip(found, expected, strict=True):
        assert np.sqrt(np.mean((own - theirs) ** 2) / np.mean(theirs**2)) < 1e-4


def check_follows(pack: Pack, reference: AheadReference) -> None:
    """As a prompt is computed in long passes and short ones, as tokens come, trees, and after cuts."""
    ids = np.random.default_rng(5).integers(3, VOCAB, 60).tolist()
    with with_ahead(pack, chunk=16, max_draft_tokens=8) as engine:
        runner, sequence, ahead = engine.runner, engine.sequence, engine.ahead
        runner.prefill(sequence, ids[:37])
        ahead.follow(ids[:38])
        check(drafts(engine, ids[37], 3), reference.drafts(ids[:38], 3))
        runner.step_tree(sequence, [ids[37], 5, ids[38], 7, ids[39]], [-1, 0, 0, 1, 2])
        sequence.commit([0, 2, 4])
        ahead.follow(ids[38:41])
        check(drafts(engine, ids[40], 2), reference.drafts(ids[:41], 2))
        for end in range(41, 60):  # nobody asks for a draft
            runner.step(sequence, ids[end - 1])
            ahead.follow([ids[end]])
        check(drafts(engine, ids[59], 1), reference.drafts(ids, 1))
        other = [*ids[:30], *ids[:9]]
        kept = sequence.keep_shared(other)
        runner.prefill(sequence, other[:-1])
        ahead.follow(other)
        if kept >= 29:  # the state before the first of the others is gone where a sequence is cut back
            assert ahead.draft(other[-1], 0) is not None
        runner.prefill(sequence, ids[3:20])
        ahead.follow(ids[3:21])
        check(drafts(engine, ids[20], 2), reference.drafts(ids[3:21], 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_gives_what_it_should(tmp_path: Path, family: str) -> None:
    reference = ahead_checkpoint(family, tmp_path / "checkpoint")
    check_follows(packed(tmp_path / "checkpoint", tmp_path / "pack"), reference)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in GGUF_FAMILIES])
def test_the_layer_is_read_from_gguf(tmp_path: Path, family: str) -> None:
    reference = ahead_gguf(family, tmp_path / "model.gguf")
    check_follows(packed(tmp_path / "model.gguf", tmp_path / "pack"), reference)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_5_text"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=5)], ids=["greedy", "drawn"])
def test_text_is_the_same_with_the_layer(tmp_path: Path, family: str, sampling: Sampling) -> None:
    ahead_checkpoint(family, tmp_path / "checkpoint")
    pack = packed(tmp_path / "checkpoint", tmp_path / "pack", "int4")
    prompt = np.random.default_rng(7).integers(3, VOCAB, 21).tolist()
    with tiny_engine(pack, 1.0, context=CONTEXT) as engine:
        expected = [token.id for token in engine.generate(prompt, 40, sampling, ignore_eos=True)]
    for share in (1.0, 0.8):
        with with_ahead(pack, share, max_draft_tokens=6) as engine:
            assert engine.ahead is not None
            with mock.patch.object(engine.ahead, "draft", wraps=engine.ahead.draft) as draft:
                for _ in range(2):
                    found = [token.id for token in engine.generate(prompt, 40, sampling, ignore_eos=True)]
                    assert found == expected
            assert draft.called


PROMPT = [5, 9, 70, 33, 12, 8]


def tokens(where: Path, cache: Path, **options: object) -> tuple[list[int], bool]:
    """What comes after PROMPT, and whether the layer was loaded."""
    with flashrt.load(where, cache_dir=cache, context=64, **options) as engine:  # type: ignore[arg-type]
        return [token.id for token in engine.generate(PROMPT, 30, ignore_eos=True)], engine.ahead is not None


def test_the_layer_is_loaded_where_drafts_are_planned(tmp_path: Path) -> None:
    ahead_checkpoint("glm4_moe", tmp_path / "checkpoint")
    expected, loaded = tokens(tmp_path / "checkpoint", tmp_path / "cache", dtype="f32", speculate="off")
    assert not loaded
    assert tokens(tmp_path / "checkpoint", tmp_path / "cache", dtype="f32") == (expected, True)
    with mock.patch("flashrt.engine.loaded_pack.pays", return_value=False):
        assert tokens(tmp_path / "checkpoint", tmp_path / "cache", dtype="f32") == (expected, False)


def test_the_layer_needs_the_head_and_little_of_a_budget_that_streams(tmp_path: Path) -> None:
    ahead_checkpoint("qwen3_5_text", tmp_path / "checkpoint")
    pack = packed(tmp_path / "checkpoint", tmp_path / "pack")
    arguments, runtime = (pack.spec, pack.layout), runtime_for("cpu", threads=2)
    cases = ((1.0, 4 << 20, True), (0.0, 1 << 10, False), (0.7, 1 << 10, True), (0.7, 4 << 20, False))
    for share, nbytes, expected in cases:
        the_plan = tiny_plan(pack, runtime, share, max_draft_tokens=4, ahead_bytes=nbytes)
        assert pays(the_plan, *arguments) == expected, (share, nbytes)


def test_the_layer_is_read_from_a_file_that_is_not_packed(tmp_path: Path) -> None:
    """The outline is found again, and once more where the file has moved."""
    shapes = {"hidden_size": 64, "intermediate_size": 128}
    ahead_gguf("qwen3_5_text", tmp_path / "model.gguf", "Q8_0", **shapes)
    expected, loaded = tokens(tmp_path / "model.gguf", tmp_path / "cache", speculate="off")
    assert not loaded
    assert tokens(tmp_path / "model.gguf", tmp_path / "cache") == (expected, True)
    (tmp_path / "model.gguf").rename(tmp_path / "other.gguf")
    assert tokens(tmp_path / "other.gguf", tmp_path / "cache") == (expected, True)
    (outline,) = filter(Path.is_dir, (tmp_path / "cache" / "packs").iterdir())
    assert Pack(outline / AHEAD_DIR).sources[0].path == str(tmp_path / "other.gguf")


def test_the_plan_says_what_the_layer_takes(tmp_path: Path) -> None:
    ahead_checkpoint("glm4_moe", tmp_path / "checkpoint")
    pack = packed(tmp_path / "checkpoint", tmp_path / "pack")
    model = open_model(pack.path, LoadOptions(context=CONTEXT, budget_gb=None))
    the_plan = model.plan(Workload(CONTEXT))
    assert model.ahead is not None
    own = ahead_plan(model.ahead, model.runtime, CONTEXT, model.costs.kv_codec)
    assert (
        the_plan.owners[AHEAD]
        == ahead_bytes(own, pack.spec.hidden)
        > sum(tensor.nbytes for tensor in model.ahead.layout.tensors.values())
    )
    assert sum(the_plan.owners.values()) == the_plan.budget_bytes


def test_a_damaged_layer_is_found(tmp_path: Path) -> None:
    ahead_checkpoint("glm4_moe", tmp_path / "checkpoint")
    pack = packed(tmp_path / "checkpoint", tmp_path / "pack")
    pack.verify()
    path = pack.path / AHEAD_DIR / "resident.safetensors"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackError, match="ahead"):
        pack.verify()


def test_a_layer_that_is_not_whole_is_left_out(tmp_path: Path) -> None:
    ahead_checkpoint("glm4_moe", tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.3.enorm.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.warns(CheckpointWarning, match="predicts further tokens.* is left out.*enorm"):
        found = packed(tmp_path / "checkpoint", tmp_path / "pack")
    assert ahead_pack(found) is None


def test_a_pack_that_was_interrupted_behind_the_layer_is_finished(tmp_path: Path) -> None:
    """The layer is not packed twice, and binds the pack to its checkpoint and dtype as other weights do."""
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "pack"
    ahead_checkpoint("glm4_moe", checkpoint)
    interrupt = mock.patch("flashrt.storage.packer._finished_files", side_effect=[{}, {}, {}, KeyboardInterrupt])
    with interrupt, pytest.raises(KeyboardInterrupt):
        packed(checkpoint, out, "int8")
    written = (out / AHEAD_DIR / MANIFEST_FILE).stat().st_mtime_ns
    with pytest.raises(UsageError, match="unfinished pack of another checkpoint or dtype"):
        packed(checkpoint, out, "int4")
    move_checkpoint(checkpoint, out, "int8", lambda *_: None)
    assert not (checkpoint / "model.safetensors").exists()
    assert (out / AHEAD_DIR / MANIFEST_FILE).stat().st_mtime_ns == written
    Pack(out).verify()
