"""Packs of quantized checkpoints: weights that a kept codec holds are kept, others are what plain ones would become."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flashrt.checkpoints.content import content_of
from flashrt.checkpoints.pack_job import move_checkpoint, pack_checkpoint
from flashrt.storage.pack import Pack, is_pack
from flashrt.storage.packer import JOB_FILE
from flashrt.storage.sources import open_checkpoint
from flashrt.storage.sources.moved import RECORD
from flashrt_kernels.rows import KEPT, row_bytes
from tests.engine.support import logits_of, tiny_engine
from tests.quantized import FORMATS, MODEL, Format, changed, quantized_checkpoint

from .test_kept import decoded, neurons_of, raw
from .test_moving import same_pack
from .test_packer import Killed, _kill_at, contents

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module", params=FORMATS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Format, Path, Path]:
    own = FORMATS[request.param]
    return own, *quantized_checkpoint(own, tmp_path_factory.mktemp(request.param), **own.extra)


def packed(checkpoint: Path, out: Path, dtype: str = "auto") -> Pack:
    pack_checkpoint(checkpoint, out, dtype, out.parent, lambda *_: None)
    return Pack(out)


def bits(values: np.ndarray) -> np.ndarray:
    return (values + 0.0).view(np.uint32)  # zeros of either sign are the same weight


def test_quantizing_gives_what_a_plain_checkpoint_gives(case: tuple[Format, Path, Path], tmp_path: Path) -> None:
    found, plain = packed(case[1], tmp_path / "a", "int4"), packed(case[2], tmp_path / "b", "int4")
    assert found.manifest.kept is None
    assert found.manifest.files == plain.manifest.files


def test_what_is_kept_is_said_and_has_every_bit(case: tuple[Format, Path, Path], tmp_path: Path) -> None:
    """Both where the shapes are whole blocks and where they are not."""
    own, path, plain = case
    found = packed(path, tmp_path / "p")
    kept = found.manifest.kept
    assert kept is not None
    assert [codec.value.upper() for codec in kept.codecs] == ([] if own.kept is None else [own.kept])
    assert kept.requantized["embed"] == kept.requantized["head"] == "F32"
    if own.kept is None:
        label = kept.requantized["0.out"]
        assert label not in ("F32", *(codec.value for codec in KEPT))
        assert {kept.requantized[f"{i}.ffn.{part}"] for i in range(3) for part in ("gate", "up", "down")} == {label}
        plainly = packed(plain, tmp_path / "q", "int8")
        assert found.manifest.files == plainly.manifest.files
        assert found.manifest.weights == "int8"
    else:
        assert set(kept.requantized) == {"embed", "head"}
        with open_checkpoint(plain) as source:
            for name, tensor in found.layout.tensors.items():
                if name.endswith(".ffn"):
                    expected = source.neuron_rows(name, 0, 0, found.spec.layers[0].ffn.neurons)
                    pairs = list(zip(neurons_of(found, tensor, 0), expected, strict=True))
                elif tensor.codec in KEPT:
                    rows = raw(found, tensor)[0][:, : 8 * row_bytes(tensor.codec, tensor.columns)]
                    wanted = source.matrix_rows(tensor.matrix, tensor.row0, tensor.row0 + tensor.rows)
                    pairs = [(decoded(rows, tensor.codec, tensor.columns)[: tensor.rows], wanted)]
                else:
                    continue
                assert all(b is not None and np.array_equal(bits(a), bits(b)) for a, b in pairs), name
    found.verify()


def test_a_run_computes_what_the_plain_checkpoint_computes(case: tuple[Format, Path, Path], tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    prompt, tokens = random.integers(3, 131, 20).tolist(), random.integers(3, 131, 6).tolist()
    logits = []
    for path, dtype in ((case[1], "auto"), (case[2], "f32")):
        with tiny_engine(packed(path, tmp_path / dtype, dtype), 0.5, chunk=16) as engine:
            logits.append(logits_of(engine, prompt, tokens))
    assert np.square(logits[0] - logits[1]).mean() ** 0.5 < 6e-2 * np.square(logits[1]).mean() ** 0.5


def sharded(path: Path, out: Path) -> Path:
    """The checkpoint in five files; the tensors of a matrix lie in several."""
    directory, tensors = Path(shutil.copytree(path, out)), load_file(path / MODEL)
    (directory / MODEL).unlink()
    where = {name: f"model-{i * 5 // len(tensors)}-{i % 2}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name, own in where.items() if own == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": where}))
    return directory


@pytest.mark.parametrize("name", ["fp8", "fp8-auto", "mxfp4", "nvfp4", "int4-wide", "int4-order", "gptq", "awq"])
def test_a_move_that_is_killed_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With files gone, what is known of the format is the record's."""
    path, _ = quantized_checkpoint(FORMATS[name], tmp_path, **FORMATS[name].extra)
    whole = contents(packed(path, tmp_path / "whole").path)
    gone = 0
    for point in range(20, 75, 13):
        source, out = sharded(path, tmp_path / f"s{point}"), tmp_path / f"p{point}"
        before = len(list(source.glob("*.safetensors")))
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            _kill_at(patch, point)
            move_checkpoint(source, out, "auto", lambda *_: None)
        left = len(list(source.glob("*.safetensors")))
        gone += 0 < left < before
        if not is_pack(out) or (out / RECORD).exists() or (out / JOB_FILE).exists():
            move_checkpoint(source, out, "auto", lambda *_: None)
        assert same_pack(contents(out), whole)
        assert not list(source.glob("*.safetensors"))
    assert gone


def test_another_scale_is_another_checkpoint(case: tuple[Format, Path, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(case[1], tmp_path / "m"))
    before = content_of(path, tmp_path)
    for name, tensor in load_file(path / MODEL).items():
        if "scale" in name and "layers.2" in name:
            other = (tensor.reshape(-1).view(torch.uint8) ^ 1).view(tensor.dtype).reshape(tensor.shape)
            with changed(path, {name: other}):
                assert content_of(path, tmp_path) != before
            return
    raise AssertionError("no scale")
