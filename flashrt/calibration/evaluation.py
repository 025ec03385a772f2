"""What sparse mode costs on a text: the exact model's predictions beside those of its calibrated pack."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.calibration.divergence import Divergence, diverge, logits_of, predicted, record, replay, targets_of
from flashrt.engine.engine import Engine
from flashrt.model.ffn.sparse import Selection
from flashrt_kernels.limits import NARROW_TOKENS

Array = np.ndarray
Progress = Callable[[str, int, int], None]


class Reference:
    """Logits of the exact model on some windows, float16 in a file that goes with it. Use it as a context manager."""

    def __init__(self, engine: Engine, windows: Sequence[Sequence[int]], folder: Path, progress: Progress) -> None:
        self.windows, self._vocab = windows, engine.spec.vocab
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed on the way out
        record(engine, windows, self._file, lambda done, total: progress("exact", done, total))

    def __enter__(self) -> Reference:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def divergence(self, engine: Engine, progress: Progress) -> Divergence:
        """How far `engine` is from the reference on its windows, computing as it decodes."""
        total = predicted(self.windows)

        def found() -> Iterator[Array]:
            done = 0
            for logits in logits_of(engine, self.windows):
                yield logits
                done += len(logits)
                progress("sparse", done, total)

        return diverge(replay(self._file, self._vocab, self.windows), found(), targets_of(self.windows))


def select(engine: Engine, windows: Sequence[Sequence[int]]) -> list[Selection]:
    """Recall and precision of the neurons chosen, on the first pass of every window.

    Those that should take part are those whose exact activation reaches the block's threshold, given the same input.
    """
    sparse: Any = engine.runner.decoder.sparse
    with sparse.comparing() as selections:  # these passes are not part of what was measured
        for window in windows:
            engine.sequence.rewind(0)
            engine.runner.step_batch(engine.sequence, window[:NARROW_TOKENS])
    return list(selections)


def figures(found: Divergence, engine: Engine, selections: Sequence[Selection]) -> dict[str, Any]:
    """The figures of `flashrt eval quality`, for programs."""
    sparse, sparsity = engine.runner.decoder.sparse, engine.sparsity
    assert sparse is not None
    assert sparsity is not None
    layers = [
        {**sparse.shares(i), "recall": s.recall, "precision": s.precision} for i, s in enumerate(selections)
    ]  # fmt: skip
    mean = {key: float(np.mean([layer[key] for layer in layers])) for key in layers[0]}
    return {
        "method": sparsity.method,
        "ppl_exact": math.exp(-found.reference.mean()),
        "ppl_sparse": math.exp(-found.found.mean()),
        "loss": found.rise,
        "max_loss": sparsity.max_loss,
        "kl_mean": float(found.kl.mean()),
        "kl_max": float(found.kl.max()),
        "top1_agreement": float(found.agree.mean()),
        "tokens": len(found.kl),
        "rows_share": mean["rows"],
        **{f"{key}_share": mean[key] for key in ("channels", "heads") if key in mean},
        "ffn_bytes_share": mean["bytes"],
        "predictor_bytes_share": sparse.decision_share(),
        "recall": mean["recall"],
        "precision": mean["precision"],
        "layers": layers,
    }
