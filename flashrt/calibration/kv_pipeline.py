"""Calibration of sparse attention: from a pack and some text to labels of keys beside it.

    text       windows, from a file or written by the model itself; long ones are held out
    moments    of queries and keys, which labels are fitted to
    ranges     of label values, which their codes cover
    errors     of what heads give on the text held out, at several shares kept
    shares     what each head keeps, where that is better than all the same
    losses     of perplexity on the text held out, at several shares kept
    labels     beside the pack

Everything lies in a working directory inside the pack until it is done; an interrupted calibration is taken up again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from flashrt.budget.plan import Workload
from flashrt.calibration.kv_errors import Errors
from flashrt.calibration.kv_fit import Ranges, Rotations, projections
from flashrt.calibration.kv_losses import Losses
from flashrt.calibration.kv_moments import Moments
from flashrt.calibration.kv_reading import BLOCK, Progress, Reading, reading_bytes
from flashrt.calibration.kv_shares import SHARES, divide, error_at, is_dense
from flashrt.calibration.kv_windows import KvText, Lengths
from flashrt.calibration.windows import Windows
from flashrt.calibration.work_dir import work_dir
from flashrt.engine.engine import Engine
from flashrt.engine.loaded_pack import LoadedPack
from flashrt.engine.options import LoadOptions
from flashrt.engine.runtime import Runtime, runtime_for
from flashrt.errors import UnsupportedModelError, UsageError
from flashrt.labels import CHANNEL_STEP, VERSION, KvLabels, LayerLabels, most_channels
from flashrt.spec import ModelSpec
from flashrt.storage.kv_labels import write_labels
from flashrt.storage.pack import Pack
from flashrt_kernels.limits import NARROW_TOKENS

TEXT_FILE, LOSSES_FILE, WORK_DIR = "text.json", "losses.json", "kv-labels.partial"


@dataclass(frozen=True, slots=True)
class KvRequest:
    """What is asked of a calibration. text None: the model writes its own; tokens None: as many as `Lengths` says."""

    text: str | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class KvCalibration:
    """What came of it. Errors are those of what heads give at 1/16, as shares of its square, on text held out."""

    labels: KvLabels
    errors: tuple[float | None, ...]  # by layer, None without labels
    uniform_error: float  # their mean, where every head keeps as much
    divided_error: float  # the same, where each keeps its share


def calibrate_kv(path: Path, options: LoadOptions, request: KvRequest, progress: Progress) -> KvCalibration:
    """Make labels for the pack at `path`; what `flashrt run` with --kv sparse then uses lies inside it.

    Of the options, budget, threads and cache count: it computes exactly, on the CPU, without drafts. Raises
    UnsupportedModelError for a model all of whose layers see a window, UsageError for a calibrated pack, for too short
    a text and while another calibration is going on, DiskError when the disk fails or is full.
    """
    base = Pack(path)
    if base.manifest.sparsity is not None:
        raise UsageError("this pack is a calibrated one: name the pack that it lies in")
    labelled_layers(base.spec)
    lengths = Lengths.of(base.spec.context, request.tokens)
    job = {
        "kv": VERSION,
        "base": base.manifest.hash,
        "text": None if request.text is None else hashlib.sha256(request.text.encode()).hexdigest(),
        "lengths": asdict(lengths),
    }
    runtime = runtime_for("cpu", options.threads)
    with work_dir(path, job, WORK_DIR) as work:
        run = _Calibration(base, work, request.text, lengths, progress)
        return run.run(replace(options, speculate="off", context=lengths.held_out), runtime)


class _Calibration:
    def __init__(self, base: Pack, work: Path, text: str | None, lengths: Lengths, progress: Progress) -> None:
        self.base, self.work, self.text, self.lengths, self.progress = base, work, text, lengths, progress
        self.attentions = {i: base.spec.layers[i].attention for i in labelled_layers(base.spec)}
        self.rotations = {i: Rotations(own, base.spec.context) for i, own in self.attentions.items()}

    def run(self, options: LoadOptions, runtime: Runtime) -> KvCalibration:
        length = self.lengths.held_out
        workload = Workload(length, prompt=length, logit_rows=NARROW_TOKENS)
        model = LoadedPack(self.base, options, runtime, beside=reading_bytes(self.attentions.values(), length))

        def shown(_: str, done: int, total: int) -> None:
            self.progress("loading MiB", done >> 20, total >> 20)

        with model.load(workload, shown) as engine:
            text = self._text(engine)
            reading = Reading(engine, self.attentions, self.progress)
            fitted = self._fit(reading, text.fitted)
            errors = reading.errors(text.held_out, fitted, self.rotations)
        found = self._chosen(fitted, errors)
        losses = Losses(self.base, options, runtime, text.held_out, length, self.work / LOSSES_FILE)
        measured = losses.measure(found.labels, lambda done, total: self.progress("losses", done, total))
        labels = replace(found.labels, losses=measured)
        write_labels(self.base.path, labels, self.base.spec)
        return replace(found, labels=labels)

    def _text(self, engine: Engine) -> KvText:
        if self.text is not None:
            return self.lengths.cut(engine.tokenizer, self.text)
        return self.lengths.write(
            engine, self.work / TEXT_FILE, lambda done, total: self.progress("writing text", done, total)
        )

    def _fit(self, reading: Reading, windows: Windows) -> dict[int, LayerLabels]:
        """The labels of each layer, from what an earlier calibration left or from the text."""
        paths = {i: self.work / f"moments-{i:03d}.npz" for i in self.attentions}
        if not all(path.exists() for path in paths.values()):
            for i, own in reading.moments(windows).items():
                own.save(paths[i])
        ranges, queries = {}, {}
        for done, (i, path) in enumerate(paths.items()):
            channels = most_channels(self.attentions[i])
            assert channels is not None
            keys, queries[i], means = projections(Moments.load(path), self.rotations[i], channels)
            ranges[i] = Ranges(keys, means)
            self.progress("fitting", done + 1, len(paths))
        reading.ranges(windows, ranges, self.rotations)
        return {i: own.labels(queries[i]) for i, own in ranges.items()}

    def _chosen(self, fitted: Mapping[int, LayerLabels], errors: Mapping[int, Errors]) -> KvCalibration:
        """The labels, with shares that were chosen on half of the rows, where they do better on the others."""
        halves = [[own.relative(rows) for own in errors.values()] for rows in (slice(0, None, 2), slice(1, None, 2))]
        even = [np.ones(len(layer)) for layer in halves[0]]
        divided = divide(halves[0])
        uniform_error, divided_error = error_at(halves[1], even), error_at(halves[1], divided)
        better = divided if divided_error < uniform_error else even
        shares = {i: own for i, own in zip(errors, better, strict=True) if not is_dense(own)}
        layers = range(len(self.base.spec.layers))
        labels = KvLabels(
            self.base.manifest.hash,
            BLOCK,
            tuple(fitted[i] if i in shares else None for i in layers),
            tuple(tuple(map(float, shares.get(i, ()))) for i in layers),
        )
        place = SHARES.index(1.0)
        whole = {i: float(own.relative(slice(None))[:, place].sum()) for i, own in errors.items()}
        return KvCalibration(labels, tuple(whole.get(i) for i in layers), uniform_error, divided_error)


def labelled_layers(spec: ModelSpec) -> list[int]:
    """The layers that can have labels. Raises UnsupportedModelError for a model that has none."""
    if spec.latent:
        raise UnsupportedModelError(f"{spec.family}: latents cannot have labels; use --kv exact")
    layers = [i for i, attention in spec.attentions.items() if most_channels(attention) is not None]
    for attention in (spec.layers[i].attention for i in layers):
        partial = attention.rope is not None and (attention.rope.dims or attention.rope.share < 1)
        borrows = attention.kv_from is not None
        if attention.softcap or attention.temperature or attention.qk_unit or partial or borrows:
            what = "heads that are rotated in part" if partial else "attention scores that are soft-capped or scaled"
            what = "layers that attend to the keys of others" if borrows else what
            raise UnsupportedModelError(f"{spec.family}: {what} cannot have labels; use --kv exact")
    if not layers:
        raise UnsupportedModelError(
            f"{spec.family}: all layers of this model see a window, or have heads narrower than {CHANNEL_STEP}; its "
            "keys and values need no labels"
        )
    return layers
