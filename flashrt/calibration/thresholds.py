"""The search for thresholds: what each block may leave out, so that the model loses no more than it is allowed to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashrt.calibration.allocation import Fit, Picked, Weight, allocate, cost
from flashrt.calibration.divergence import Divergence, diverge, logits_of, replay, targets_of
from flashrt.calibration.windows import Split
from flashrt.engine.engine import Engine
from flashrt.sparsity import Layers

LEAST_RISE = 1e-5  # nats: noise must not make a block free
MARGIN = 0.8  # of the loss allowed that is aimed at: other text may lose more
CLOSE = 0.95  # of what is aimed at: the search is over
TRIALS = 10  # prices of loss that are tried at most

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Trial:
    """The pack with everything stored whole, to try choices on beside what the exact model predicted.

    `reference` is the file of its predictions on `split.compared`; `own_text`: the model itself wrote the text.
    """

    engine: Engine
    fits: Sequence[Fit]
    split: Split
    reference: Path
    own_text: bool

    def divergence(self, picked: Sequence[Picked], name: str) -> Divergence:
        """Under these choices, on the windows of this name."""
        sparse: Any = self.engine.runner.decoder.sparse
        sparse.restart(self.thresholds(picked))
        windows = self.split.compared[name]
        with open(self.reference, "rb") as file:
            expected = replay(file, self.engine.spec.vocab, windows, self.split.first_row(name))
            return diverge(expected, logits_of(self.engine, windows), targets_of(windows))

    def loss(self, found: Divergence) -> float:
        """The increase of perplexity, which the model's own text tells by divergence, people's text by itself, too."""
        return found.loss if self.own_text else max(found.loss, found.rise)

    def thresholds(self, picked: Sequence[Picked]) -> Layers:
        return tuple(fit.sparsity(choices) for fit, choices in zip(self.fits, picked, strict=True))

    def figures(self, picked: Sequence[Picked]) -> dict[str, Any]:
        """What took part since the last `divergence`, block by block and on average."""
        sparse: Any = self.engine.runner.decoder.sparse
        layers = [
            {**sparse.shares(i), **fit.figures(choices)}
            for i, (fit, choices) in enumerate(zip(self.fits, picked, strict=True))
        ]
        return {"layers": layers, **(sparse.mean_shares() or {})}


@dataclass(frozen=True, slots=True)
class Found:
    """Choices within the loss allowed, and what they lose and leave on the windows that check them."""

    picked: Sequence[Picked]
    loss: float
    figures: dict[str, Any]


def weigh(trial: Trial, progress: Progress) -> list[Weight]:
    """Nats of divergence for each unit of a block's error, measured one block, and one of its parts, at a time."""
    free = [tuple(choices[0] for choices in fit.parts) for fit in trial.fits]  # let everything through

    def nats(picked: Sequence[Picked]) -> float:
        return float(trial.divergence(picked, "probe").kl.mean())

    nothing, weights = nats(free), []
    for i, fit in enumerate(trial.fits):
        weight = []
        for part, strong in enumerate(fit.strong):
            thinned = (*free[i][:part], strong, *free[i][part + 1 :])
            rise = nats([*free[:i], thinned, *free[i + 1 :]]) - nothing
            weight.append(max(rise, LEAST_RISE) / max(strong.error, 1e-30))
        weights.append(tuple(weight))
        progress(i + 1, len(trial.fits))
    return weights


def search(trial: Trial, weights: Sequence[Weight], max_loss: float, stored: float, progress: Progress) -> Found | None:
    """The choices that save the most within the loss allowed; None where there are none.

    The predicted loss is corrected by what is found on the windows for tuning until that fits; those for checking must
    agree. `stored` is what a byte that has to be stored is worth beside one that a token touches.
    """
    aim = asked = MARGIN * max_loss
    best: Found | None = None
    for n in range(TRIALS):
        picked = allocate(trial.fits, weights, asked, stored)
        loss = trial.loss(trial.divergence(picked, "tuning"))
        progress(n + 1, TRIALS)
        if loss <= aim:
            check = trial.divergence(picked, "checking")
            if trial.loss(check) > max_loss:
                aim /= 2  # the windows for tuning were easier than others
            elif best is None or cost(picked, stored) < cost(best.picked, stored):
                held_out = {"held_out_kl": float(check.kl.mean()), "top1_agreement": float(check.agree.mean())}
                best = Found(picked, max(trial.loss(check), 0.0), trial.figures(picked) | held_out)
            if best is not None and loss > CLOSE * aim:
                break
        asked *= float(np.clip(aim / max(loss, 1e-9), 0.1, 4.0)) * (0.97 if loss > aim else 1.0)
    return best
