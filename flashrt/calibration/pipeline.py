"""Calibration: from a pack and some text to a calibrated pack beside it, whose loss is known.

    text       windows of tokens: from a file, or written by the model itself
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

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.budget.planner import Workload
from flashrt.calibration.allocation import Fit, Picked, Weight, allocate, cost
from flashrt.calibration.divergence import Divergence, diverge, logits_of, predicted, record, replay, targets_of
from flashrt.calibration.fit_channels import Inputs
from flashrt.calibration.methods import Method, method_for
from flashrt.config import Sampling
from flashrt.engine.build import LoadedPack
from flashrt.engine.engine import Engine
from flashrt.engine.runtime import Runtime
from flashrt.engine.sampling import Sampler
from flashrt.errors import DiskError, UnsupportedModelError, UsageError
from flashrt.sparsity import VERSION, Layers, Sparsity
from flashrt.spec import ModelSpec
from flashrt.storage.manifest import MANIFEST_FILE, SPARSE_DIR
from flashrt.storage.pack import Pack
from flashrt.storage.packer import pack, write_atomically
from flashrt.text.tokenizer import Tokenizer
from flashrt_kernels.limits import NARROW_TOKENS

WORK_DIR = "sparse.partial"
TRIAL_DIR = "trial"  # in the working directory: the pack with everything stored whole, to choose by
WINDOW = 128  # tokens of one piece of text
FITTED = 0.5  # of the text, its beginning; the first half of the rest sets the price of loss, the other checks it
PROBED = 96  # tokens on which each block's weight is measured
LEAST_RISE = 1e-5  # nats: noise must not make a block free
TOP_P = 0.9  # of the probability that text written by the model is drawn from
RESIDENT, STREAMED = 0.25, 6.0  # what a byte stored is worth beside one touched: in memory, and where some stream
MARGIN = 0.8  # of the loss allowed that is aimed at: other text may lose more
CLOSE = 0.95  # of what is aimed at: the search is over
TRIALS = 10  # prices of loss that are tried at most
TEXT_FILE, WEIGHT_FILE = "text.json", "weights.json"
REFERENCE_FILE = "reference.f16"

Array = np.ndarray
Progress = Callable[[str, int, int], None]  # what is going on, done, in all


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a calibration. text None: the model writes its own; tokens None: as many as the method takes."""

    max_loss: float = 0.02
    text: str | None = None
    tokens: int | None = None
    budget_gb: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.max_loss <= 1:
            raise UsageError(f"the loss allowed is {self.max_loss}, expected more than 0 and at most 1 (0.02 is 2%)")
        if self.tokens is not None and self.tokens < 6 * WINDOW:
            raise UsageError(f"{self.tokens} tokens are too few to calibrate with, expected {6 * WINDOW} or more")


def calibrate(path: Path, cache: Path, runtime: Runtime, request: Request, progress: Progress) -> Sparsity:
    """Calibrate the pack at `path`; what `flashrt.run` with mode 'sparse' then uses lies inside it.

    Raises UnsupportedModelError for packs that cannot be thinned out, UsageError for too short a text and while another
    calibration is going on, DiskError when the disk fails or is full.
    """
    base = Pack(path)
    _check_supported(base)
    method = method_for(base, runtime.ops)
    with _work(path, _job(base, request, method)) as work:
        return _Calibration(path, base, work, cache, runtime, request, progress, method).run()


class _Calibration:
    def __init__(
        self,
        path: Path,
        base: Pack,
        work: Path,
        cache: Path,
        runtime: Runtime,
        request: Request,
        progress: Progress,
        method: Method,
    ) -> None:
        self.path, self.base, self.work, self.cache, self.runtime = path, base, work, cache, runtime
        self.request, self.progress = request, progress
        self.tokens = request.tokens or method.tokens
        self.spec: ModelSpec = base.spec
        self.method = method
        self.streams = False  # whether the model is larger than the budget given

    def run(self) -> Sparsity:
        with self._engine(self.path) as exact:
            windows = self._text(exact)
            fitted, tuning, checking = _split(windows)
            probe = _cut(fitted, PROBED)
            self._sample(exact, fitted)
            self._reference(exact, [*probe, *tuning, *checking])
            self.streams = not exact.plan.resident
        self._fit()
        fits = self._fits()
        whole: Any = tuple(fit.whole for fit in fits)
        self._write(TRIAL_DIR, Sparsity(self.base.manifest.hash, 0.0, 0.0, whole))
        with self._engine(self.work / TRIAL_DIR) as trial:
            weights = self._weights(trial, probe)
            sparsity = self._choose(trial, weights, probe, tuning, checking)
        shutil.rmtree(self.work / SPARSE_DIR, ignore_errors=True)  # of an earlier, killed run that chose otherwise
        self._write(SPARSE_DIR, sparsity)
        self._finish()
        return sparsity

    @contextlib.contextmanager
    def _engine(self, path: Path) -> Iterator[Engine]:
        prepared = LoadedPack(path, self.cache, self.runtime, self.request.budget_gb)
        context = min(max(WINDOW, NARROW_TOKENS), self.spec.context)
        the_plan = prepared.plan(Workload(context, prompt=context, logit_rows=NARROW_TOKENS))
        with prepared.engine(the_plan, self._in_mib("loading MiB")) as engine:
            yield engine

    def _in_mib(self, stage: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(stage, done >> 20, total >> 20)

    def _text(self, engine: Engine) -> list[list[int]]:
        """Windows of token ids."""
        path = self.work / TEXT_FILE
        if path.exists():
            return [list(map(int, window)) for window in json.loads(path.read_bytes())]
        length = min(WINDOW, self.spec.context)
        if self.request.text is not None:
            windows = _windows(engine.tokenizer, self.request.text, length, self.tokens)
        else:
            windows = []
            count = self.tokens // length
            for n in range(count):
                windows.append(_written(engine, n, length))
                self.progress("writing text", n + 1, count)
        write_atomically(path, json.dumps(windows).encode())
        return windows

    def _sample(self, engine: Engine, windows: list[list[int]]) -> None:
        """What the method asks for of every block, and the mean square of the residual stream before it.

        Files of float16 [layers, tokens, numbers] and float32 [layers, tokens].
        """
        asked = self.method.samples
        if all(self._sample_file(kind).exists() for kind in asked):
            return
        layers, total = len(self.spec.layers), sum(len(window) for window in windows)
        squares = {kind: np.empty((layers, total), np.float32) for kind in asked}
        seen = {kind: [0] * layers for kind in asked}  # tokens; a window may take several passes
        with contextlib.ExitStack() as files:
            samples = {
                kind: files.enter_context(_array(self._sample_file(kind), (layers, total, numbers), np.float16))
                for kind, numbers in asked.items()
            }

            def observe(kind: str, i: int, residual: Array, values: Array) -> None:
                if kind in asked:
                    own = slice(seen[kind][i], seen[kind][i] + len(values))
                    samples[kind][i, own, : values.shape[1]] = np.clip(values, -65504, 65504)
                    squares[kind][i, own] = (residual**2).mean(1)
                    seen[kind][i] = own.stop

            engine.decoder.observe = observe
            for window in windows:
                engine.prefill(window)
                engine.rewind(0)
                self.progress("sampling", seen["ffn"][0], total)
            engine.decoder.observe = None
            for kind in asked:
                np.save(self._squares_file(kind), squares[kind])

    def _sample_file(self, kind: str) -> Path:
        return self.work / f"{kind}.npy"

    def _squares_file(self, kind: str) -> Path:
        return self.work / f"{kind}-squares.npy"

    def _reference(self, engine: Engine, windows: list[list[int]]) -> None:
        """What the model predicts, float16 [tokens, vocab]."""
        path = self.work / REFERENCE_FILE
        if path.exists():
            return
        _check_room(path.parent, 2 * predicted(windows) * self.spec.vocab)
        temporary = path.with_suffix(".tmp")
        with open(temporary, "wb") as file:
            record(engine, windows, file, lambda done, total: self.progress("predicting", done, total))
        os.replace(temporary, path)

    def _fit(self) -> None:
        for i in range(len(self.spec.layers)):
            path = self.work / f"fit-{i:03d}.npz"
            if not path.exists():
                self.method.fit(i, {kind: self._inputs(kind, i) for kind in self.method.samples}).save(path)
            self.progress("fitting", i + 1, len(self.spec.layers))

    def _inputs(self, kind: str, i: int) -> Inputs:
        samples, squares = np.load(self._sample_file(kind), mmap_mode="r"), np.load(self._squares_file(kind))
        return Inputs(np.asarray(samples[i], np.float32), 1 / (self.spec.hidden * squares[i]))

    def _write(self, folder: str, sparsity: Sparsity) -> None:
        """A calibrated pack in the working directory."""
        out = self.work / folder
        if (out / MANIFEST_FILE).exists():
            return
        source = self.method.source(self._fitted, sparsity.layers)
        block_bytes = self.base.manifest.block_bytes
        pack(
            source,
            out,
            self.base.manifest.dtype,
            progress=lambda file, done, total: self._in_mib("writing MiB")(done, total),
            block_bytes=block_bytes,
            encoder=source,
            sparsity=sparsity,
        )

    def _weights(self, engine: Engine, probe: list[list[int]]) -> list[Weight]:
        """Nats of divergence for each unit of a block's error, measured one block, and one of its parts, at a time."""
        path = self.work / WEIGHT_FILE
        if path.exists():
            return list(map(tuple, json.loads(path.read_bytes())))
        fits = self._fits()
        free = [_free(fit) for fit in fits]

        def nats(picked: Sequence[Picked]) -> float:
            return float(self._divergence(engine, _layers(fits, picked), probe, 0).kl.mean())

        nothing, weights = nats(free), []
        for i, fit in enumerate(fits):
            weight = []
            for part, strong in enumerate(fit.strong):
                thinned = (*free[i][:part], strong, *free[i][part + 1 :])
                rise = nats([*free[:i], thinned, *free[i + 1 :]]) - nothing
                weight.append(max(rise, LEAST_RISE) / max(strong.error, 1e-30))
            weights.append(tuple(weight))
            self.progress("weighing", i + 1, len(fits))
        write_atomically(path, json.dumps(weights).encode())
        return weights

    def _choose(
        self,
        engine: Engine,
        weights: list[Weight],
        probe: list[list[int]],
        tuning: list[list[int]],
        checking: list[list[int]],
    ) -> Sparsity:
        """The thresholds that save the most within the loss allowed.

        The predicted loss is corrected by what is found on the windows for tuning until that fits; those for checking
        must agree.
        """
        fits, stored = self._fits(), STREAMED if self.streams else RESIDENT
        first = predicted(probe)
        after = first + predicted(tuning)
        aim = MARGIN * self.request.max_loss
        asked, best = aim, None
        for trial in range(TRIALS):
            picked = allocate(fits, weights, asked, stored)
            thresholds = _layers(fits, picked)
            found = self._loss(self._divergence(engine, thresholds, tuning, first))
            self.progress("choosing", trial + 1, TRIALS)
            if found <= aim:
                check = self._divergence(engine, thresholds, checking, after)
                if self._loss(check) > self.request.max_loss:
                    aim /= 2  # the windows for tuning were easier than others
                elif best is None or cost(picked, stored) < cost(best[0], stored):
                    best = picked, thresholds, check, self._figures(engine, fits, picked)
                if best is not None and found > CLOSE * aim:
                    break
            asked *= float(np.clip(aim / max(found, 1e-9), 0.1, 4.0)) * (0.97 if found > aim else 1.0)
        if best is None:
            raise UsageError(
                f"nothing can be left out at a loss of {self.request.max_loss:.2%}: storing these blocks by "
                f"{self.method.unit} alone costs more. Allow more with --max-loss"
            )
        _, thresholds, check, figures = best
        figures |= {"held_out_kl": float(check.kl.mean()), "top1_agreement": float(check.agree.mean())}
        return Sparsity(
            self.base.manifest.hash, self.request.max_loss, max(self._loss(check), 0.0), thresholds, figures
        )

    def _loss(self, found: Divergence) -> float:
        """The increase of perplexity, which the model's own text tells by divergence, people's text by itself, too."""
        return found.loss if self.request.text is None else max(found.loss, found.rise)

    def _divergence(self, engine: Engine, thresholds: Layers, windows: list[list[int]], first: int) -> Divergence:
        """Of the tokens of `windows`, whose reference begins at row `first`."""
        sparse = engine.decoder.sparse
        assert sparse is not None
        sparse.restart(thresholds)
        with open(self.work / REFERENCE_FILE, "rb") as file:
            expected = replay(file, self.spec.vocab, windows, first)
            return diverge(expected, logits_of(engine, windows), targets_of(windows))

    def _figures(self, engine: Engine, fits: Sequence[Fit], picked: Sequence[Picked]) -> dict[str, Any]:
        sparse = engine.decoder.sparse
        assert sparse is not None
        layers = [
            {**sparse.shares(i), **fit.figures(choices)}
            for i, (fit, choices) in enumerate(zip(fits, picked, strict=True))
        ]
        return {"tokens": self.tokens, "layers": layers, **(sparse.mean_shares() or {})}

    def _fits(self) -> list[Fit]:
        return [self._fitted(i) for i in range(len(self.spec.layers))]

    def _fitted(self, i: int) -> Any:
        return self.method.load(self.work / f"fit-{i:03d}.npz")

    def _finish(self) -> None:
        """Put the pack where it is looked for."""
        target, old = self.path / SPARSE_DIR, self.work / "old"
        if target.exists():
            os.rename(target, old)
        os.rename(self.work / SPARSE_DIR, target)


def _check_supported(base: Pack) -> None:
    if base.manifest.sparsity is not None:
        raise UsageError("this pack is a calibrated one: name the pack that it lies in")
    if any(layer.ffn.experts for layer in base.spec.layers):
        raise UnsupportedModelError("mixtures of experts need no calibration: their router says what a token needs")


def _job(base: Pack, request: Request, method: Method) -> dict[str, Any]:
    """What makes two calibrations the same one. The loss allowed is not part of it: it is asked of the last step."""
    digest = None if request.text is None else hashlib.sha256(request.text.encode()).hexdigest()
    return {"version": VERSION, "base": base.manifest.hash, "text": digest, "tokens": request.tokens or method.tokens}


@contextlib.contextmanager
def _work(path: Path, job: dict[str, Any]) -> Iterator[Path]:
    """The working directory, held for this calibration alone, with what an earlier one of the same job left."""
    work = path / WORK_DIR
    try:
        work.mkdir(exist_ok=True)
        lock = open(work / "lock", "w")  # noqa: SIM115 - entered below, outside this try
    except OSError as error:
        raise DiskError(f"cannot write to {path}: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another process is calibrating {path}") from None
        noted = work / "job.json"
        if not (noted.exists() and noted.read_text() == json.dumps(job)):
            for entry in work.iterdir():
                if entry.name != "lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            write_atomically(noted, json.dumps(job).encode())
        yield work
        shutil.rmtree(work)


@contextlib.contextmanager
def _array(path: Path, shape: tuple[int, ...], dtype: Any) -> Iterator[Array]:
    """An array on disk, there whole or not at all."""
    temporary = path.with_suffix(".tmp.npy")
    _check_room(path.parent, int(np.prod(shape)) * np.dtype(dtype).itemsize)
    array = np.lib.format.open_memmap(temporary, "w+", dtype, shape)
    yield array
    array.flush()
    os.replace(temporary, path)


def _check_room(folder: Path, needed: int) -> None:
    """Raises DiskError when so many bytes do not fit."""
    free = shutil.disk_usage(folder).free
    if free < needed + (64 << 20):
        raise DiskError(f"calibration needs {needed / 1e9:.2f} GB more in {folder}, {free / 1e9:.2f} GB are free")


def _windows(tokenizer: Tokenizer, text: str, length: int, tokens: int) -> list[list[int]]:
    """Pieces spread evenly over a text, each beginning as texts do. Raises UsageError when it is too short."""
    ids, prefix = tokenizer.encode(text, special=False), tokenizer.encode("")
    step = length - len(prefix)
    whole = [[*prefix, *ids[i : i + step]] for i in range(0, len(ids) - step + 1, step)]
    if len(whole) < 6:
        raise UsageError(
            f"the text has {len(ids)} tokens, calibration takes {6 * step} or more: give a longer file, or none"
        )
    wanted = min(tokens // length, len(whole))
    return [whole[i] for i in np.linspace(0, len(whole) - 1, wanted).astype(int)]


def _written(engine: Engine, seed: int, length: int) -> list[int]:
    """A piece of text by the model itself: one token drawn blindly, the rest from the likelier of its predictions.

    So calibration needs no data (Liu et al., LLM-QAT, arXiv:2305.17888, section 3.1). Drawn from all predictions, text
    that began with a blind token stays odd, and loses twice as much as people's text does.
    """
    prefix = engine.tokenizer.encode("")
    start = int(np.random.default_rng(seed).integers(engine.spec.vocab))
    ids = [*prefix, start]
    sampler = Sampler(Sampling(temperature=1.0, top_p=TOP_P, seed=seed), ids)
    logits = engine.prefill(ids)
    while len(ids) < length:
        token = sampler.choose(logits)
        ids.append(token)
        if len(ids) < length:
            logits = engine.step(token)
    engine.rewind(0)
    return ids


def _split(windows: list[list[int]]) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """The windows to fit to, to choose by and to check with: stretches, since neighbours in a text know each other."""
    first = round(FITTED * len(windows))
    second = (first + len(windows)) // 2
    return windows[:first], windows[first:second], windows[second:]


def _cut(windows: list[list[int]], tokens: int) -> list[list[int]]:
    """The beginnings of a few windows, about `tokens` tokens in all."""
    each = 2 * NARROW_TOKENS + 1
    return [window[:each] for window in windows[: max(tokens // (2 * NARROW_TOKENS), 1)]]


def _free(fit: Fit) -> Picked:
    """The choices that let everything through."""
    return tuple(choices[0] for choices in fit.parts)


def _layers(fits: Sequence[Fit], picked: Sequence[Picked]) -> Layers:
    return tuple(fit.sparsity(choices) for fit, choices in zip(fits, picked, strict=True))
