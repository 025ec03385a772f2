"""Calibration: from a pack and some text to a calibrated pack beside it, whose loss is known.

    windows    pieces of text: from a file, or written by the model itself
    samples    inputs of every block, and what the model predicts on the tokens held out
    fits       for every block: order, norms, and what each choice saves and costs (this package)
    trial      a calibrated pack that stores everything
    weights    what an error of each block does to the predictions, measured on it, block by block
    thresholds the choices that save the most within the loss allowed, checked on tokens that nothing was fitted to
    pack       the calibrated pack

Everything lies in a working directory inside the pack until it is done. What an interrupted calibration has finished is
taken up again by the next one, if it is for the same pack, text and version; otherwise it starts afresh.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashrt.budget.plan import Workload
from flashrt.calibration.allocation import Weight
from flashrt.calibration.divergence import predicted, record
from flashrt.calibration.methods import Method, method_for
from flashrt.calibration.sample_files import SampleFiles
from flashrt.calibration.thresholds import Found, Trial, search, weigh
from flashrt.calibration.windows import LEAST_WINDOWS, WINDOW, Split, Windows, cut, written
from flashrt.calibration.work_dir import check_room, work_dir
from flashrt.config import checked_loss, whole
from flashrt.engine.engine import Engine
from flashrt.engine.loaded_pack import LoadedPack
from flashrt.engine.options import LoadOptions
from flashrt.engine.runtime import Runtime, runtime_for
from flashrt.errors import UnsupportedModelError, UsageError
from flashrt.sparsity import VERSION, Sparsity
from flashrt.storage.atomic import disk_errors, replacing, write_atomically
from flashrt.storage.manifest import MANIFEST_FILE, SPARSE_DIR
from flashrt.storage.pack import Pack
from flashrt.storage.packer import pack
from flashrt_kernels.limits import NARROW_TOKENS

TRIAL_DIR = "trial"  # in the working directory: the pack with everything stored whole, to choose by
RESIDENT, STREAMED = 0.25, 6.0  # what a byte stored is worth beside one touched: in memory, and where some stream
TEXT_FILE, WEIGHT_FILE, REFERENCE_FILE = "text.json", "weights.json", "reference.f16"

Progress = Callable[[str, int, int], None]  # what is going on, done, in all


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a calibration. text None: the model writes its own; tokens None: as many as the method takes."""

    max_loss: float = 0.02
    text: str | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        checked_loss(self.max_loss)
        if self.tokens is not None:
            whole("tokens", self.tokens, LEAST_WINDOWS * WINDOW)


def calibrate(path: Path, options: LoadOptions, request: Request, progress: Progress) -> Sparsity:
    """Calibrate the pack at `path`; what `flashrt run` with mode 'sparse' then uses lies inside it.

    Of the options, budget, threads and cache count: it computes exactly, on the CPU, without drafts. Raises
    UnsupportedModelError for packs that cannot be calibrated, UsageError for too short a text and while another
    calibration is going on, DiskError when the disk fails or is full.
    """
    base = Pack(path)
    _check_supported(base)
    runtime = runtime_for("cpu", options.threads)
    method = method_for(base, runtime.ops)
    models = _Models(replace(options, speculate="off"), runtime, progress)
    with work_dir(path, _job(base, request, method)) as work:
        return _Calibration(base, method, work, models, request, progress).run()


@dataclass(frozen=True, slots=True)
class _Models:
    """Loads packs as calibration computes with them."""

    options: LoadOptions
    runtime: Runtime
    progress: Progress

    def load(self, opened: Pack) -> Engine:
        context = min(max(WINDOW, NARROW_TOKENS), opened.spec.context)
        model = LoadedPack(opened, self.options, self.runtime)
        shown = _in_mib(self.progress, "loading MiB")
        workload = Workload(context, prompt=context, logit_rows=NARROW_TOKENS)
        return model.load(workload, lambda _, done, total: shown(done, total))


@dataclass(frozen=True, slots=True)
class _Calibration:
    base: Pack
    method: Method
    work: Path
    models: _Models
    request: Request
    progress: Progress

    def run(self) -> Sparsity:
        samples = SampleFiles(self.work, self.base.spec, self.method.samples)
        with self.models.load(self.base) as exact:
            split = Split.of(self._windows(exact))
            samples.record(exact, split.fitted, self._stage("sampling"))
            self._predict(exact, split)
            streams = not exact.plan.resident
        self._fit(samples)
        fits = [self._fitted(i) for i in range(len(self.base.spec.layers))]
        everything: Any = tuple(fit.whole for fit in fits)
        self._write(TRIAL_DIR, Sparsity(self.base.manifest.hash, 0.0, 0.0, everything))
        with self.models.load(Pack(self.work / TRIAL_DIR)) as engine:
            trial = Trial(engine, fits, split, self.work / REFERENCE_FILE, self.request.text is None)
            sparsity = self._choose(trial, STREAMED if streams else RESIDENT)
        shutil.rmtree(self.work / SPARSE_DIR, ignore_errors=True)  # of an earlier, killed run that chose otherwise
        self._write(SPARSE_DIR, sparsity)
        self._finish()
        return sparsity

    def _windows(self, engine: Engine) -> Windows:
        path, length = self.work / TEXT_FILE, min(WINDOW, self.base.spec.context)
        tokens = self.request.tokens or self.method.tokens
        if path.exists():
            return [list(map(int, window)) for window in json.loads(path.read_bytes())]
        if self.request.text is not None:
            windows = cut(engine.tokenizer, self.request.text, length, tokens)
        else:
            windows, count = [], tokens // length
            for n in range(count):
                windows.append(written(engine, n, length))
                self.progress("writing text", n + 1, count)
        write_atomically(path, json.dumps(windows).encode())
        return windows

    def _predict(self, engine: Engine, split: Split) -> None:
        """What the model predicts, float16 [tokens, vocab]."""
        path = self.work / REFERENCE_FILE
        if path.exists():
            return
        windows = [window for part in split.compared.values() for window in part]
        check_room(path.parent, 2 * predicted(windows) * self.base.spec.vocab)
        with disk_errors(path.parent), replacing(path) as file:
            record(engine, windows, file, self._stage("predicting"))

    def _fit(self, samples: SampleFiles) -> None:
        count = len(self.base.spec.layers)
        for i in range(count):
            if not self._fit_path(i).exists():
                self.method.fit(i, samples.inputs(i)).save(self._fit_path(i))
            self.progress("fitting", i + 1, count)

    def _fitted(self, i: int) -> Any:
        return self.method.load(self._fit_path(i))

    def _fit_path(self, i: int) -> Path:
        return self.work / f"fit-{i:03d}.npz"

    def _choose(self, trial: Trial, stored: float) -> Sparsity:
        """Raises UsageError where nothing can be left out."""
        max_loss = self.request.max_loss
        found = search(trial, self._weights(trial), max_loss, stored, self._stage("choosing"))
        if found is None:
            raise UsageError(
                f"nothing can be left out at a loss of {max_loss:.2%}: storing these blocks by {self.method.unit} "
                "alone costs more. Allow more with --max-loss"
            )
        return self._sparsity(trial, found)

    def _sparsity(self, trial: Trial, found: Found) -> Sparsity:
        figures = {"tokens": self.request.tokens or self.method.tokens, **found.figures}
        thresholds = trial.thresholds(found.picked)
        return Sparsity(self.base.manifest.hash, self.request.max_loss, found.loss, thresholds, figures)

    def _weights(self, trial: Trial) -> list[Weight]:
        path = self.work / WEIGHT_FILE
        if path.exists():
            return list(map(tuple, json.loads(path.read_bytes())))
        weights = weigh(trial, self._stage("weighing"))
        write_atomically(path, json.dumps(weights).encode())
        return weights

    def _write(self, folder: str, sparsity: Sparsity) -> None:
        """A calibrated pack in the working directory."""
        out = self.work / folder
        if (out / MANIFEST_FILE).exists():
            return
        source, manifest = self.method.source(self._fitted, sparsity.layers), self.base.manifest
        progress = _in_mib(self.progress, "writing MiB")
        pack(
            source,
            out,
            manifest.dtype,
            progress=lambda file, done, total: progress(done, total),
            block_bytes=manifest.block_bytes,
            encoder=source,
            sparsity=sparsity,
        )

    def _finish(self) -> None:
        """Put the pack where it is looked for."""
        target, old = self.base.path / SPARSE_DIR, self.work / "old"
        if target.exists():
            os.rename(target, old)
        os.rename(self.work / SPARSE_DIR, target)

    def _stage(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(stage, done, total)


def _in_mib(progress: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(stage, done >> 20, total >> 20)


def _check_supported(base: Pack) -> None:
    if base.manifest.sparsity is not None:
        raise UsageError("this pack is a calibrated one: name the pack that it lies in")
    if any(layer.ffn.experts for layer in base.spec.layers):
        raise UnsupportedModelError("mixtures of experts need no calibration: their router says what a token needs")


def _job(base: Pack, request: Request, method: Method) -> dict[str, Any]:
    """What makes two calibrations the same one. The loss allowed is not part of it: it is asked of the last step."""
    digest = None if request.text is None else hashlib.sha256(request.text.encode()).hexdigest()
    return {"version": VERSION, "base": base.manifest.hash, "text": digest, "tokens": request.tokens or method.tokens}
