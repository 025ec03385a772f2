"""What every block was given on calibration text, in files: more than memory would hold."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from flashrt.calibration.fit_channels import Inputs
from flashrt.calibration.windows import Windows
from flashrt.calibration.work_dir import check_room
from flashrt.engine.engine import Engine
from flashrt.spec import ModelSpec
from flashrt.storage.atomic import disk_errors, replacing

LARGEST = 65504  # of float16

Array = np.ndarray


class SampleFiles:
    """By kind: float16 [layers, tokens, numbers], and float32 [layers, tokens], which are the mean squares of the
    residual stream before the block.

    `numbers` maps each kind (see `Decoder.observing`) to how many numbers a token has.
    """

    def __init__(self, folder: Path, spec: ModelSpec, numbers: Mapping[str, int]) -> None:
        self._folder, self._spec, self._numbers = folder, spec, numbers

    def record(self, engine: Engine, windows: Windows, progress: Callable[[int, int], None]) -> None:
        """Write the files, unless they are there, while `engine` reads the windows. Raises DiskError."""
        if all(self._path(kind).exists() for kind in self._numbers):
            return
        layers, total = len(self._spec.layers), sum(map(len, windows))
        check_room(self._folder, sum(2 * layers * total * numbers for numbers in self._numbers.values()))
        squares = {kind: np.empty((layers, total), np.float32) for kind in self._numbers}
        seen = {kind: [0] * layers for kind in self._numbers}  # tokens; a window may take several passes
        with disk_errors(self._folder), contextlib.ExitStack() as files:
            samples = {
                kind: _ArrayFile(files.enter_context(replacing(self._path(kind))), (layers, total, numbers))
                for kind, numbers in self._numbers.items()
            }

            def observe(kind: str, i: int, residual: Array, values: Array) -> None:
                if kind in samples:
                    begin = seen[kind][i]
                    seen[kind][i] += len(values)
                    samples[kind].write(i, begin, np.clip(values, -LARGEST, LARGEST))
                    squares[kind][i, begin : seen[kind][i]] = (residual**2).mean(1)

            with engine.runner.decoder.observing(observe):
                for window in windows:
                    engine.runner.prefill(engine.sequence, window)
                    engine.sequence.rewind(0)
                    progress(seen["ffn"][0], total)
            for kind in self._numbers:
                with replacing(self._squares_path(kind)) as file:
                    np.save(file, squares[kind])

    def inputs(self, i: int) -> dict[str, Inputs]:
        """What block `i` was given, by kind."""
        return {kind: self._inputs(kind, i) for kind in self._numbers}

    def _inputs(self, kind: str, i: int) -> Inputs:
        samples, squares = np.load(self._path(kind), mmap_mode="r"), np.load(self._squares_path(kind))
        return Inputs(np.asarray(samples[i], np.float32), 1 / (self._spec.hidden * squares[i]))

    def _path(self, kind: str) -> Path:
        return self._folder / f"{kind}.npy"

    def _squares_path(self, kind: str) -> Path:
        return self._folder / f"{kind}-squares.npy"


class _ArrayFile:
    """An .npy file of float16 [layers, tokens, numbers] that is written piece by piece; what is not written is 0."""

    def __init__(self, file: IO[bytes], shape: tuple[int, int, int]) -> None:
        self._file, self._shape = file, shape
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        self._begin = file.tell()
        file.truncate(self._begin + 2 * int(np.prod(shape)))

    def write(self, layer: int, token: int, values: Array) -> None:
        """Put `values` ([n, up to `numbers`]) at these tokens of a layer."""
        _, tokens, numbers = self._shape
        rows = np.zeros((len(values), numbers), "<f2")
        rows[:, : values.shape[1]] = values
        self._file.seek(self._begin + 2 * numbers * (layer * tokens + token))
        self._file.write(rows.tobytes())
