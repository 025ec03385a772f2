"""Divergence and rise against their definitions, token by token in float64."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.calibration.divergence import diverge

VOCAB = 37


def log_softmax(logits):
    return logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))


def test_it_is_what_the_definitions_say():
    rng = np.random.default_rng(0)
    ours = [rng.standard_normal((n, VOCAB)).astype(np.float32) for n in (16, 5)]
    theirs = [logits + 0.3 * rng.standard_normal(logits.shape).astype(np.float32) for logits in ours]
    targets = [rng.integers(0, VOCAB, len(logits)) for logits in ours]
    found = diverge(ours, theirs, targets)

    p, q = log_softmax(np.concatenate(ours)), log_softmax(np.concatenate(theirs))
    wanted = np.arange(21), np.concatenate(targets)
    assert found.kl == pytest.approx((np.exp(p) * (p - q)).sum(1), rel=1e-4)
    assert found.agree.tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    assert found.loss == pytest.approx(np.exp((np.exp(p) * (p - q)).sum(1).mean()) - 1, rel=1e-4)
    assert found.rise == pytest.approx(np.exp((p[wanted] - q[wanted]).mean()) - 1, rel=1e-4)


def test_of_text_that_the_reference_writes_the_rise_is_the_divergence():
    rng = np.random.default_rng(1)
    ours = np.repeat(rng.standard_normal((1, VOCAB)), 40000, 0).astype(np.float32)
    theirs = ours + 0.5 * rng.standard_normal(VOCAB).astype(np.float32)
    targets = rng.choice(VOCAB, len(ours), p=np.exp(log_softmax(ours[0])))
    found = diverge([ours], [theirs], [targets])
    assert found.rise == pytest.approx(found.loss, rel=0.1)
