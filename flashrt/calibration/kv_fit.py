"""Which numbers of a key tell best what a query will make of it.

Of all pairs of r projections, a singular value decomposition of Cq^(1/2) Ck^(1/2) gives those whose product is nearest
to q · k, for queries of second moments Cq and keys of covariance Ck (Eckart and Young, Psychometrika 1, 1936). RoPE
turns both with their positions. Moments recorded at some positions are therefore worth little at others: recorded at
up to 4096, they gave four times the error at 8192. So moments are recorded before RoPE, then averaged over rotations by
the positions of contexts up to the model's.
"""

from __future__ import annotations

import math

import numpy as np

from flashrt.calibration.kv_moments import Moments
from flashrt.labels import LayerLabels
from flashrt.spec import Attention

Array = np.ndarray

SHORTEST = 4096  # tokens of the shortest context that labels are fitted to
ROTATIONS = 2048  # positions that stand for those of a context
LATE = 0.75  # of a context: queries stand behind that, where they see most of its keys
SMALLEST = 1e-7  # of the largest singular value: what is below it is noise
SPREAD, BINS = 12.0, 768  # of a histogram: standard deviations to both sides, and how many bins
REACHES = np.geomspace(0.25, 2 * SPREAD, 64)  # to both sides of the median, that codes may cover
LAST_CODE = 15
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, less their whole part, fill 0 to 1 evenly


class Rotations:
    """The rotations of a layer's keys and queries in contexts of several lengths."""

    def __init__(self, attention: Attention, context: int) -> None:
        self._rope, self._dim = attention.rope, attention.head_dim
        self._lengths = _lengths(context)
        self._factor = 1.0 if attention.rope is None else attention.rope.attention_factor

    def moment(self, moment: Array, first: float) -> Array:
        """The mean of R m Rᵀ, of a second moment m, float64 [head_dim, head_dim].

        It is over positions of every context, from a share `first` of it on.
        """
        if self._rope is None:
            return moment
        half = self._dim // 2
        a, b, c, d = moment[:half, :half], moment[:half, half:], moment[half:, :half], moment[half:, half:]
        turned, mirrored = (a + d) + 1j * (c - b), (a - d) + 1j * (c + b)  # of z = x + iy: z zᴴ and z zᵀ
        waves = self._waves(first)
        turned = turned * (waves.T @ waves.conj() / len(waves))
        mirrored = mirrored * (waves.T @ waves / len(waves))
        upper = np.hstack([(turned + mirrored).real, (mirrored - turned).imag])
        lower = np.hstack([(turned + mirrored).imag, (turned - mirrored).real])
        return np.vstack([upper, lower]) * (self._factor**2 / 2)

    def mean(self, mean: Array) -> Array:
        """The mean of R m, of a vector m, float64 [head_dim]."""
        if self._rope is None:
            return mean
        half = self._dim // 2
        turned = (mean[:half] + 1j * mean[half:]) * self._waves(0.0).mean(axis=0) * self._factor
        return np.concatenate([turned.real, turned.imag])

    def scattered(self, keys: Array, first: int) -> Array:
        """Keys, float32 [T, kv_heads, head_dim], each turned by a position of its own in one of the contexts.

        first: how many keys came before, so that each context takes its turn, and its positions evenly
        """
        numbers = np.arange(first, first + len(keys))
        result = np.empty_like(keys)
        for i, length in enumerate(self._lengths):
            own = np.flatnonzero(numbers % len(self._lengths) == i)
            result[own] = self.turned(keys[own], np.floor(length * (numbers[own] * GOLDEN % 1.0)), length)
        return result

    def turned(self, vectors: Array, positions: Array, context: int) -> Array:
        """What RoPE makes of vectors [T, heads, head_dim] at these positions [T] of a context, float32."""
        if self._rope is None:
            return vectors
        half = self._dim // 2
        waves = self._turns(positions, context)[:, None] * self._factor
        turned = (vectors[..., :half] + 1j * vectors[..., half:]) * waves
        return np.concatenate([turned.real, turned.imag], axis=-1).astype(np.float32)

    def _waves(self, first: float) -> Array:
        """Turns at positions of all contexts, as many of each."""
        return np.concatenate([self._turns(np.linspace(first * n, n, ROTATIONS), n) for n in self._lengths])

    def _turns(self, positions: Array, context: int) -> Array:
        """exp(i position frequency), complex [positions, head_dim / 2]."""
        assert self._rope is not None
        frequencies = np.asarray(self._rope.inverse_frequencies(self._dim, context), np.float64)
        return np.exp(1j * positions[:, None] * frequencies)


def project(queries: Array, keys: Array, channels: int) -> tuple[Array, Array]:
    """The projections whose products are nearest to q · k, float64 [channels, head_dim] for keys and for queries.

    queries: the second moment of queries; keys: the covariance of keys. Label values of keys have variance 1, and none
    tells of another; those of queries say what a key's is worth.
    """
    q, k = _root(queries), _root(keys)
    left, values, right = np.linalg.svd(q @ k)
    used = np.maximum(values[:channels], max(values[0] * SMALLEST, np.finfo(np.float64).tiny))
    return (left[:, :channels] / used).T @ q, right[:channels] @ k


def projections(moments: Moments, rotations: Rotations, channels: int) -> tuple[Array, Array, Array]:
    """Of keys and of queries, float32 [kv_heads, channels, head_dim], and the means of the keys' label values,
    float32 [kv_heads, channels].
    """
    found = []
    for head in range(len(moments.keys)):
        queries, keys, mean = moments.means(head)
        mean = rotations.mean(mean)
        covariance = rotations.moment(keys, 0.0) - np.outer(mean, mean)
        of_keys, of_queries = project(rotations.moment(queries, LATE), covariance, channels)
        found.append((of_keys, of_queries, of_keys @ mean))
    of_keys, of_queries, means = (np.asarray(part, np.float32) for part in zip(*found, strict=True))
    return of_keys, of_queries, means


class Ranges:
    """Histograms of label values, from which the range of their codes is chosen."""

    def __init__(self, keys: Array, means: Array) -> None:
        self.keys, self.means = keys, means
        self.counts = np.zeros((*means.shape, BINS), np.int64)

    def add(self, keys: Array) -> None:
        """Take in keys after RoPE, float32 [T, kv_heads, head_dim]. What lies outside counts at the edge."""
        values = (keys.swapaxes(0, 1) @ self.keys.swapaxes(1, 2)) - self.means[:, None]
        places = np.clip((values + SPREAD) * (BINS / (2 * SPREAD)), 0, BINS - 1).astype(np.int64)
        heads, channels = self.means.shape
        rows = np.arange(heads)[:, None, None] * channels + np.arange(channels)
        flat = np.bincount((rows * BINS + places).reshape(-1), minlength=heads * channels * BINS)
        self.counts += flat.reshape(self.counts.shape)

    def labels(self, queries: Array) -> LayerLabels:
        """The labels whose codes are nearest to the values, on average."""
        heads, channels = self.means.shape
        low, step = np.empty((2, heads, channels), np.float32)
        for h in range(heads):
            for c in range(channels):
                low[h, c], step[h, c] = best_range(self.counts[h, c])
        return LayerLabels(self.keys, queries, low + self.means, step)


def best_range(counts: Array) -> tuple[float, float]:
    """The first value and the step of 16 codes with the least squared error on a histogram, int64 [BINS]."""
    centres = (np.arange(BINS) + 0.5) * (2 * SPREAD / BINS) - SPREAD
    used = np.flatnonzero(counts)
    if len(used) == 0:
        return -1.0, 2.0 / LAST_CODE
    values, weights = centres[used], counts[used].astype(np.float64)
    middle = centres[np.searchsorted(np.cumsum(counts), counts.sum() / 2)]
    width = SPREAD / BINS  # of half a bin, so that a range is never empty
    lows = np.maximum(middle - REACHES, values[0] - width)
    steps = (np.minimum(middle + REACHES, values[-1] + width) - lows) / LAST_CODE
    codes = np.clip(np.rint((values - lows[:, None]) / steps[:, None]), 0, LAST_CODE)
    errors = ((values - lows[:, None] - codes * steps[:, None]) ** 2 * weights).sum(axis=1)
    best = int(errors.argmin())
    return float(lows[best]), float(steps[best])


def _lengths(context: int) -> list[int]:
    """Contexts from `SHORTEST` on, each twice the one before, up to the model's."""
    lengths = [min(SHORTEST, context)]
    while 2 * lengths[-1] <= context:
        lengths.append(2 * lengths[-1])
    return lengths


def _root(matrix: Array) -> Array:
    """The square root of a symmetric matrix that is positive up to rounding."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
