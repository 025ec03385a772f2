"""In which order the neurons of a layer lie on disk: hot ones first, and neurons that fire together side by side.

A read of several neighbours costs little more than one of a single row, so misses should be neighbours. LLM in a Flash
(section 3.1, "bundling based on co-activation") found that neighbours of hot neurons end up in every bundle; here hot
neurons come first, where they are pinned, and co-activation orders the others only.

Co-activation is taken from an embedding: the leading eigenvectors of the matrix of co-activation counts, found without
making that matrix. Through the embedded neurons goes a chain, each next one the most like those placed last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from flashrt.calibration.samples import Samples

Array = np.ndarray

HOT = 0.05  # of the neurons, by frequency alone
BANDS = (0.25, 0.5)  # of the others: chains end here, so that any prefix that a budget pins holds hotter neurons
DIMENSIONS = 32  # of the embedding: 64 and 128 save less than 1% more
OVERSAMPLING = 8
ITERATIONS = 4
DECAY = 0.7  # how much of a neuron's pull on the chain is left at the next one
EVEN = 10  # active neurons are added to those of a token, so that one with few does not count beyond measure
CHUNK = 512  # tokens whose activity exists at once


def neuron_order(samples: Samples) -> Array:
    """The neurons in the order in which to store them, int32 [neurons]; the same for the same samples.

    Takes time in proportion to neurons² · DIMENSIONS, memory to neurons · (DIMENSIONS + CHUNK).
    """
    frequency = samples.frequency()
    by_frequency = np.argsort(-frequency, kind="stable").astype(np.int32)
    hot = int(HOT * samples.neurons)
    cold = by_frequency[hot:]
    embedding = embed(samples, cold)
    cuts = [0, *(int(share * len(cold)) for share in BANDS), len(cold)]
    bands = [begin + chain(embedding[begin:end]) for begin, end in itertools.pairwise(cuts)]
    return np.concatenate([by_frequency[:hot], *(cold[band] for band in bands)])


def embed(samples: Samples, neurons: Array) -> Array:
    """Unit vectors, float32 [len(neurons), dimensions]; how alike two are says how alike their neurons fire.

    Eigenvectors by subspace iteration (Halko et al. 2011) on M Mᵀ, where M is activity with rows and columns evened.
    """
    wide = min(DIMENSIONS + OVERSAMPLING, len(neurons))
    norms = np.sqrt(_weighted_counts(samples, neurons) + 1e-3)[:, None]
    start = np.random.default_rng(0).standard_normal((len(neurons), wide)).astype(np.float32)
    basis = np.linalg.qr(_apply(samples, neurons, norms, start))[0]
    for _ in range(ITERATIONS - 1):
        basis = np.linalg.qr(_apply(samples, neurons, norms, basis))[0]
    values, vectors = np.linalg.eigh(basis.T @ _apply(samples, neurons, norms, basis))
    embedding = (basis @ vectors * np.sqrt(np.maximum(values, 0)))[:, ::-1][:, :DIMENSIONS]
    return np.ascontiguousarray(embedding / np.maximum(np.linalg.norm(embedding, axis=1, keepdims=True), 1e-6))


def chain(vectors: Array) -> Array:
    """Indices of all vectors (float32 [n, d]), from the first on: next comes the one most like the recent ones."""
    order = np.empty(len(vectors), np.int32)
    taken = np.zeros(len(vectors), np.float32)
    recent, current = np.zeros(vectors.shape[1], np.float32), 0
    for i in range(len(vectors)):
        order[i] = current
        taken[current] = -np.inf
        recent = DECAY * recent + vectors[current]
        current = int(np.argmax(vectors @ recent + taken))
    return order


def _activity(samples: Samples, neurons: Array) -> Iterator[tuple[Array, Array]]:
    """Chunks of activity, float32 [n, len(neurons)] of zeros and ones, and the weights of their tokens, [n, 1]."""
    for begin in range(0, samples.count, CHUNK):
        active = samples.active(slice(begin, begin + CHUNK))[:, neurons].astype(np.float32)
        yield active, 1 / (active.sum(axis=1, keepdims=True) + EVEN)


def _weighted_counts(samples: Samples, neurons: Array) -> Array:
    """Diagonal of the matrix of weighted co-activation counts."""
    total = np.zeros(len(neurons), np.float32)
    for active, weight in _activity(samples, neurons):
        total += weight[:, 0] @ active
    return total


def _apply(samples: Samples, neurons: Array, norms: Array, vectors: Array) -> Array:
    """M Mᵀ vectors, for vectors float32 [len(neurons), d]."""
    total = np.zeros_like(vectors)
    for active, weight in _activity(samples, neurons):
        total += active.T @ (weight * (active @ (vectors / norms)))
    return total / norms
