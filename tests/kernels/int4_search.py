"""The search for int4 codes, written down once more in numpy: what the kernels must give byte by byte.

Sums go as in the kernels: weights i and i + 16 first, then a tree over 16, 8, 4 and 2. A fused multiplication and
addition is one in float64, rounded once: its exact value fits there but for rarest numbers.
"""

import numpy as np

from flashrt_kernels.rows import INT4_GROUP, INT4_SPAN, align

F = np.float32
GRIDS, REFITS = 16, 2


def fused(a, b, c):
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(F)


def tree(terms):
    """Sum over the last dimension, of 16."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def paired(x, y):
    """Sum of x * y, the second half fused onto the first."""
    return tree(fused(x[:, 16:], y[:, 16:], x[:, :16] * y[:, :16]))


def codes_of(w, inverse, offset):
    return np.clip(np.round((w + offset[:, None]) * inverse[:, None]), F(0), F(15))


def refit(w, counts, inverse, offset):
    """(scale, offset, error) of the codes at a grid, solved for; all float32 [groups]."""
    q = codes_of(w, inverse, offset)
    weighted = counts * w
    count, sum_w = tree(counts[:, :16] + counts[:, 16:]), tree(weighted[:, :16] + weighted[:, 16:])
    sum_ww = tree(fused(weighted[:, :16], w[:, :16], weighted[:, 16:] * w[:, 16:]))
    cq = counts * q
    sq, sqq, swq = tree(cq[:, :16] + cq[:, 16:]), paired(cq, q), paired(cq, w)
    determinant = count * sqq - sq * sq
    solvable = determinant > F(1e-6) * count * sqq
    with np.errstate(all="ignore"):
        scale = np.where(solvable, (count * swq - sum_w * sq) / determinant, F(0))
        low = np.where(solvable, (sqq * sum_w - sq * swq) / determinant, np.where(sum_w < 0, sum_w / count, F(0)))
        through_zero = (low > 0) | (~solvable & (low == 0))
        scale = np.where(through_zero, np.where(sqq > 0, swq / sqq, F(0)), scale)
        low = np.where(through_zero, F(0), low)
        scale = np.where(scale > 0, scale, F(0))
        error = sum_ww - F(2) * (scale * swq + low * sum_w) + scale * scale * sqq
        error = error + F(2) * scale * low * sq + low * low * count
    return scale, -low, error


def search(w, counts):
    top, high = np.maximum(-w, F(0)).max(1), w.max(1)
    varied = high > -top
    spread = np.where(varied, high + top, F(0))
    best = [spread / F(15), top.copy(), np.full(len(w), np.inf, F)]

    def keep(fit, wanted):
        better = wanted & (fit[2] < best[2])
        for mine, theirs in zip(best, fit, strict=True):
            mine[better] = theirs[better]

    with np.errstate(all="ignore"):
        for step in range(GRIDS):
            quarter = F(0.25) * F(step)
            inverse = (F(14.4) + quarter) / spread
            offset = top - F(0.5) * (quarter - F(0.6)) / inverse
            fit = refit(w, counts, inverse, np.where(offset > 0, offset, F(0)))
            keep(fit, varied)
            wanted = varied
            for _ in range(REFITS):
                wanted = wanted & (fit[0] > 0)
                fit = refit(w, counts, F(1) / fit[0], fit[1])
                keep(fit, wanted)
    return best[0], best[1]


def inverse_of(scale):
    with np.errstate(all="ignore"):
        return np.where(scale > 0, F(1) / scale, F(0))


def error_of(w, counts, scale, offset):
    q = codes_of(w, inverse_of(scale), offset)
    e = fused(scale[:, None], q, -offset[:, None]) - w
    e = e * e
    return tree(fused(e[:, 16:], counts[:, 16:], e[:, :16] * counts[:, :16]))


def nearest_code(x, unit):
    with np.errstate(all="ignore"):
        return np.where(unit > 0, np.clip(np.trunc(x / unit + F(0.5)), 0, 255), 0).astype(F)


def choose(w, counts, u, v, a0, b0, best, wanted):
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            a, b = a0 + F(i), b0 + F(j)
            error = error_of(w, counts, u * a, v * b)
            better = wanted & (error < best[2]) & (a >= 0) & (a <= 255) & (b >= 0) & (b <= 255)
            for mine, theirs in zip(best, (a, b, error), strict=True):
                mine[better] = theirs[better]


def encode(weights, importance=None):
    """Rows of int4 of float32 weights [n, k]: uint8 [n, row_bytes]."""
    n, k = weights.shape
    used, padded = -(-k // INT4_GROUP), align(k, 64)
    w = np.zeros((n, used * INT4_GROUP), F)
    counts = np.zeros_like(w)
    w[:, :k], counts[:, :k] = weights, 1 if importance is None else importance
    w[:, k:] = w[:, (used - 1) * INT4_GROUP, None]  # repeats the last group's first weight, and counts nothing
    w, counts = w.reshape(-1, INT4_GROUP), counts.reshape(-1, INT4_GROUP)
    scale, offset = search(w, counts)
    units = [np.maximum(x.reshape(n, used).max(1), F(0)) / F(255) for x in (scale, offset)]
    u, v = (np.repeat(x, used) for x in units)
    best = [np.zeros(len(w), F), np.zeros(len(w), F), np.full(len(w), np.inf, F)]
    choose(w, counts, u, v, nearest_code(scale, u), nearest_code(offset, v), best, np.full(len(w), True))
    with np.errstate(all="ignore"):
        again = refit(w, counts, F(1) / (u * best[0]), v * best[1])
    choose(w, counts, u, v, nearest_code(again[0], u), nearest_code(again[1], v), best, u * best[0] > 0)
    q = codes_of(w, inverse_of(u * best[0]), v * best[1]).astype(np.uint8).reshape(n, used, INT4_GROUP)
    return _rows(q, best[0].reshape(n, used), best[1].reshape(n, used), units, padded)


def _rows(q, a, b, units, padded):
    n, used = a.shape
    groups = padded // INT4_GROUP
    padding = ((0, 0), (0, groups - used))
    q = np.pad(q, (*padding, (0, 0)))
    spans = []
    for first in range(0, groups, INT4_SPAN):
        parts = q[:, first : first + INT4_SPAN].reshape(n, -1, 2, 2, 8).swapaxes(1, 2)
        spans.append((parts[..., 0, :] | parts[..., 1, :] << 4).reshape(n, -1))
    codes = [np.pad(x.astype(np.uint8), padding) for x in (a, b)]
    return np.concatenate((*spans, *codes, *(unit.reshape(n, 1).view(np.uint8) for unit in units)), 1)
