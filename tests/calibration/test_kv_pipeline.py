"""Calibration of sparse attention from end to end, on tiny models."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashrt.budget.plan import Workload
from flashrt.calibration import kv_pipeline, kv_reading, kv_windows
from flashrt.calibration.kv_errors import measure
from flashrt.calibration.kv_fit import Ranges, Rotations, projections
from flashrt.calibration.kv_pipeline import WORK_DIR, KvCalibration, KvRequest, calibrate_kv
from flashrt.calibration.kv_reading import Reading, reading_bytes
from flashrt.calibration.kv_shares import SHARES
from flashrt.engine.loaded_pack import LoadedPack
from flashrt.engine.options import LoadOptions
from flashrt.engine.runtime import runtime_for
from flashrt.errors import UnsupportedModelError, UsageError
from flashrt.kv.window import WindowStore
from flashrt.labels import LayerLabels
from flashrt.storage.kv_labels import LABELS_FILE, read_labels
from flashrt.storage.pack import Pack
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint

TEXT = "the thing and the ring are in the inn, and another thing is in the ring. " * 40


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of tiny models are shorter than what every row attends to at least."""
    monkeypatch.setattr("flashrt.kv.choice.LEAST", 8)


def packed(family: str, path: Path, dtype: Codec = Codec.F32) -> Path:
    return make_pack(tiny_checkpoint(family, path / "checkpoint", seed=3)[1], path / "pack", dtype).path


def calibrated(
    path: Path,
    text: str | None = TEXT,
    progress: Callable[[str, int, int], None] = lambda *_: None,
    tokens: int = 768,
) -> KvCalibration:
    options = LoadOptions(cache_dir=path.parent / "cache", threads=2)
    return calibrate_kv(path, options, KvRequest(text, tokens), progress)


def check_same(found: KvCalibration, expected: KvCalibration) -> None:
    assert found.labels.describe() == expected.labels.describe()
    for ours, theirs in zip(found.labels.layers, expected.labels.layers, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert all(np.array_equal(array, theirs.arrays()[name]) for name, array in ours.arrays().items())


@pytest.mark.parametrize(
    ("family", "labelled"),
    [
        ("llama-yarn", [True, True, True]),
        ("qwen3", [True, True, True]),
        ("opt", [True, True, True]),
        ("gemma3", [False, True, False, False]),
        ("mixtral", [True, True, True]),
    ],
)
def test_labels_are_made_for_layers_that_see_everything(tmp_path: Path, family: str, labelled: list[bool]) -> None:
    path = packed(family, tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    found = calibrated(path)
    assert [layer is not None for layer in found.labels.layers] == labelled
    assert [error is not None for error in found.errors] == labelled
    after = {file.name: file.read_bytes() for file in path.iterdir()}
    assert after.pop(LABELS_FILE)
    assert after == before, "the pack itself stays as it is, and nothing else is left"
    stored = read_labels(Pack(path))
    assert stored.describe() == found.labels.describe()
    assert stored.base == Pack(path).manifest.hash
    assert found.divided_error <= found.uniform_error or set(np.concatenate(stored.shares)) == {1.0}
    for shares in stored.shares:
        assert set(shares) <= set(SHARES)
    assert np.concatenate(stored.shares).mean() <= 1
    assert list(stored.losses) == ["1/16", "1/32", "1/4", "1/8"]
    assert all(loss != 0 for loss in stored.losses.values()), "less than everything was attended to"


@pytest.mark.parametrize(
    ("family", "reason"), [("gemma2", "soft-capped"), ("glm4", "in part"), ("ministral3", "scaled")]
)
def test_attention_that_labels_say_nothing_of_is_refused(tmp_path: Path, family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{family}: .*{reason}.*--kv exact"):
        calibrated(packed(family, tmp_path))


def test_a_model_of_windows_needs_none(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="all layers of this model see a window"):
        calibrated(packed("mistral", tmp_path))


def test_a_calibrated_pack_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its labels would lie where nothing looks for them."""
    path = packed("llama", tmp_path)
    thinned = SimpleNamespace(spec=Pack(path).spec, manifest=SimpleNamespace(sparsity=object()))
    monkeypatch.setattr(kv_pipeline, "Pack", lambda path: thinned)
    with pytest.raises(UsageError, match="name the pack that it lies in"):
        calibrated(path)


def test_its_own_text_will_do(tmp_path: Path) -> None:
    path = packed("llama", tmp_path, Codec.INT4)
    stages: list[str] = []
    calibrated(path, None, lambda stage, done, total: stages.append(stage))
    assert list(dict.fromkeys(stages)) == [
        "loading MiB",
        "writing text",
        "moments",
        "fitting",
        "ranges",
        "errors",
        "losses",
    ]
    assert (path / LABELS_FILE).exists()


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = packed("llama", tmp_path)
    with pytest.raises(UsageError, match="calibration takes 510 or more"):
        calibrated(path, TEXT[:200])
    with pytest.raises(UsageError, match="tokens"):
        calibrate_kv(path, LoadOptions(), KvRequest(TEXT, 100), lambda *_: None)
    assert not (path / LABELS_FILE).exists()


def test_killed_at_every_stage_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokens = packed("llama-linear", tmp_path), 1024
    whole = calibrated(path, None, tokens=tokens)
    (path / LABELS_FILE).unlink()
    seen: set[str] = set()
    calls = {"text": 0, "moments": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            calls[name] += 1
            return result

        return call

    monkeypatch.setattr(kv_windows, "written", counted("text", kv_windows.written))
    monkeypatch.setattr(Reading, "moments", counted("moments", Reading.moments))

    def killing(stage: str, done: int, total: int) -> None:
        if stage not in seen and not (stage == "writing text" and done <= total // 2):
            seen.add(stage)
            raise KeyboardInterrupt

    while True:
        try:
            found = calibrated(path, None, killing, tokens)
            break
        except KeyboardInterrupt:
            assert not (path / LABELS_FILE).exists()
    assert seen == {"loading MiB", "writing text", "moments", "fitting", "ranges", "errors", "losses"}
    assert calls == {"text": 2, "moments": 1}, "no piece of text is written, and no moments are taken twice"
    assert not (path / WORK_DIR).exists()
    check_same(found, whole)


def test_what_is_read_is_what_the_layer_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments, sampled queries and stored keys of the reading, beside those that the layer attends with."""
    path = packed("gemma3", tmp_path)
    pack = Pack(path)
    attention = pack.spec.layers[1].attention
    window = np.random.default_rng(1).integers(3, VOCAB, 90).tolist()
    with tiny_engine(pack, 1.0, chunk=16) as engine:
        store = engine.sequence.kv.stores[1]
        assert not isinstance(store, WindowStore)
        queries: list[np.ndarray] = []
        attend = store.attend
        store.attend = lambda query, *rest: (queries.append(query.copy()), attend(query, *rest))  # type: ignore[method-assign]
        reading = Reading(engine, {1: attention}, lambda *_: None)
        moments = reading.moments([window[:40], window])[1]
        assert moments.count == 130
        rotated = np.concatenate(queries)[-90:]
        taken: dict[str, Any] = {}
        held = np.empty_like(store.memory)

        def measured(own: Any, labels: Any, rows: Any, *rest: Any) -> Any:
            taken.update(rows._asdict())
            held[...] = store.memory
            return measure(own, labels, rows, *rest)

        monkeypatch.setattr(kv_reading, "measure", measured)
        wide, narrow = (
            np.ones((attention.kv_heads, 8, attention.head_dim), np.float32),
            np.ones((attention.kv_heads, 8), np.float32),
        )
        labels = LayerLabels(wide, wide, narrow, narrow)
        reading.errors([window], {1: labels}, {1: Rotations(attention, 256)})
        assert taken["positions"][-1] == 89
        np.testing.assert_allclose(taken["queries"], rotated[taken["positions"]], rtol=1e-3, atol=1e-4)
        for head in range(attention.kv_heads):
            for part, found in enumerate(taken["stored"](head)):
                np.testing.assert_array_equal(found, held[head, :90, part])
        turned = (rotated.astype(np.float64) ** 2).sum()
        first = (np.concatenate(queries)[:40].astype(np.float64) ** 2).sum()
        assert np.isclose(np.trace(moments.queries.sum(0)), turned + first, rtol=1e-4), "rotation keeps lengths"


def test_what_calibration_holds_is_planned(tmp_path: Path) -> None:
    """Measured while reading: moments, ranges, and errors over keys that are many beside the model."""
    _, checkpoint = tiny_checkpoint("llama", tmp_path / "checkpoint", seed=3, max_position_embeddings=2048)
    path = make_pack(checkpoint, tmp_path / "pack", Codec.F32).path
    pack, runtime = Pack(path), runtime_for("cpu", 2)
    attentions = {i: layer.attention for i, layer in enumerate(pack.spec.layers)}
    window = np.random.default_rng(1).integers(3, VOCAB, 2000).tolist()
    beside = reading_bytes(attentions.values(), 2048)
    plans = [LoadedPack(pack, LoadOptions(), runtime, beside=own).plan(Workload(64)) for own in (0, beside)]
    assert plans[1].owners["process"] - plans[0].owners["process"] == pytest.approx(beside, abs=8 << 20)
    rotations = {i: Rotations(own, 2048) for i, own in attentions.items()}
    with tiny_engine(pack, 1.0, context=2048, chunk=512) as engine:
        reading = Reading(engine, attentions, lambda *_: None)
        tracemalloc.start()
        try:
            moments = reading.moments([window])
            made = {i: projections(own, rotations[i], 8) for i, own in moments.items()}
            ranges = {i: Ranges(keys, means) for i, (keys, _, means) in made.items()}
            reading.ranges([window], ranges, rotations)
            labels = {i: own.labels(made[i][1]) for i, own in ranges.items()}
            reading.errors([window], labels, rotations)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert 0.3 * beside < peak < beside


@pytest.mark.parametrize("source", ["there", "missing", "compiled", "short"])
def test_pieces_are_the_models_and_the_librarys_in_turn(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where a module's source is not there, or too short, the model writes that piece too."""
    module = tmp_path / f"module.{'pyc' if source == 'compiled' else 'py'}"
    module.write_text("the thing and the ring " * (5 if source == "short" else 500))
    origin = str(tmp_path / "gone.py") if source == "missing" else str(module)
    monkeypatch.setattr(kv_windows.importlib.util, "find_spec", lambda name: SimpleNamespace(origin=origin))
    monkeypatch.setattr(kv_windows, "written", lambda engine, seed, length, report: [seed] * length)
    with tiny_engine(Pack(packed("llama", tmp_path / "pack")), 1.0) as engine:
        found = kv_windows.Lengths(60, 50, 4, 1).write(engine, tmp_path / "text", lambda done, total: None)
        text = engine.tokenizer.encode(module.read_text())[:60]
    own = [text if source == "there" else [seed] * 60 for seed in (1, 3)]
    assert found.fitted == [[0] * 60, own[0], [2] * 60, own[1]]
    assert [len(piece) for piece in found.held_out] == [50]
