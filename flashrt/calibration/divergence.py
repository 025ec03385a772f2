"""How far one engine's predictions are from another's: Kullback-Leibler divergence and log-probabilities, by token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from flashrt.engine.engine import Engine
from flashrt_kernels.limits import NARROW_TOKENS

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of each predicted token: KL(reference || found) and the log-probabilities of what followed, in nats, float64.

    `agree` says whether both think the same token most likely.
    """

    kl: Array
    reference: Array
    found: Array
    agree: Array

    @property
    def loss(self) -> float:
        """The increase of perplexity to expect, as a share.

        On text that the reference itself writes, the expected rise of the logarithm is the divergence, which a few
        hundred tokens tell far more surely than the rise itself. On people's text it was a little less, but twice as
        much for a model trained with an L1 penalty on its activations: such a model sits where the penalty holds the
        loss in balance, so that silencing a neuron costs people's text to first order, divergence to second only.
        """
        return float(np.expm1(self.kl.mean()))

    @property
    def rise(self) -> float:
        """The increase of perplexity that was found, as a share."""
        return float(np.expm1((self.reference - self.found).mean()))


def logits_of(engine: Engine, windows: Iterable[Sequence[int]]) -> Iterator[Array]:
    """Logits after each token but the last of every window, float32 [B, vocab], in passes of at most 16 tokens.

    Computed as decoding computes them. What is yielded is valid until the next.
    """
    for window in windows:
        engine.rewind(0)
        for begin in range(0, len(window) - 1, NARROW_TOKENS):
            yield engine.step_batch(window[begin : min(begin + NARROW_TOKENS, len(window) - 1)])


def targets_of(windows: Iterable[Sequence[int]]) -> Iterator[Array]:
    """What follows the tokens of `logits_of`, pass by pass."""
    for window in windows:
        for begin in range(0, len(window) - 1, NARROW_TOKENS):
            yield np.asarray(window[begin + 1 : min(begin + NARROW_TOKENS, len(window) - 1) + 1])


def record(
    engine: Engine, windows: Sequence[Sequence[int]], file: IO[bytes], progress: Callable[[int, int], None]
) -> None:
    """Write `logits_of` the windows to a file, float16 [predicted, vocab], the largest at 0, where it is finest.

    A file rather than a mapped array: it counts as nobody's memory.
    """
    done, total = 0, predicted(windows)
    for logits in logits_of(engine, windows):
        file.write((logits - logits.max(1, keepdims=True)).astype(np.float16).tobytes())
        done += len(logits)
        progress(done, total)


def replay(file: IO[bytes], vocab: int, windows: Iterable[Sequence[int]], first: int = 0) -> Iterator[Array]:
    """What was recorded from row `first` on, pass by pass."""
    file.seek(2 * vocab * first)
    for targets in targets_of(windows):
        yield np.frombuffer(file.read(2 * vocab * len(targets)), np.float16).reshape(len(targets), vocab)


def predicted(windows: Iterable[Sequence[int]]) -> int:
    """Tokens that are predicted."""
    return sum(len(window) - 1 for window in windows)


def diverge(reference: Iterable[Array], found: Iterable[Array], targets: Iterable[Array]) -> Divergence:
    """Compare logits pass by pass."""
    parts: list[tuple[Array, ...]] = []
    for ours, theirs, wanted in zip(reference, found, targets, strict=True):
        p, q = _log_softmax(ours), _log_softmax(theirs)
        rows = np.arange(len(wanted))
        kl = (np.exp(p) * (p - q)).sum(1, dtype=np.float64)
        agree = p.argmax(1) == q.argmax(1)
        parts.append((kl, p[rows, wanted].astype(np.float64), q[rows, wanted].astype(np.float64), agree))
    return Divergence(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _log_softmax(logits: Array) -> Array:
    shifted = logits.astype(np.float32)
    shifted -= shifted.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
