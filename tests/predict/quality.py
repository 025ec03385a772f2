"""How well a predictor does on samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashrt.predict.predictor import Predictor
from flashrt.predict.samples import Samples

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Quality:
    """Shares between 0 and 1."""

    recall: float  # of all importance, that of the neurons predicted
    found: float  # of all active neurons, those predicted
    precision: float  # of the neurons predicted, those active
    predicted: float  # of all neurons
    active: float  # of all neurons


def measure(predictor: Predictor, samples: Samples, tokens: Array) -> Quality:
    """The quality of predictions for `tokens` (indices), one at a time, over all of them together."""
    predicted = active = hits = 0
    importance = recalled = 0.0
    for token in tokens:
        rows = predictor.predict(samples.inputs[token : token + 1])
        own = samples.importance(slice(token, token + 1))[0]
        importance += float(own.sum(dtype=np.float64))
        recalled += float(own[rows].sum(dtype=np.float64))
        predicted += len(rows)
        active += int(np.count_nonzero(own))
        hits += int(np.count_nonzero(own[rows]))
    every = len(tokens) * samples.neurons
    return Quality(recalled / importance, hits / active, hits / max(predicted, 1), predicted / every, active / every)
