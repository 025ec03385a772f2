"""Samples: nothing is lost, and what is small is not taken for zero."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.calibration.samples import Samples, from_bfloat16, to_bfloat16
from tests.calibration.support import relu_layer, text


def test_chunks_add_up() -> None:
    layer, x = relu_layer(neurons=70), text(0, 1100)
    samples = Samples(1100, x.shape[1], layer.norms)
    for begin, end in ((0, 1), (1, 700), (700, 700), (700, 1100)):
        samples.add(x[begin:end], layer.h(x[begin:end]))
    assert samples.count == 1100
    assert samples.inputs.tobytes() == x.tobytes()
    exact = layer.h(x) * layer.norms
    assert np.array_equal(samples.active(slice(None)), exact > 0)
    np.testing.assert_allclose(samples.importance(slice(None)), exact, rtol=2**-7)
    np.testing.assert_array_equal(samples.importance(np.array([7, 3])), samples.importance(slice(None))[[7, 3]])
    np.testing.assert_allclose(samples.frequency(), (exact > 0).mean(axis=0))
    assert samples.nbytes == 1100 * (4 * 72 + 2 * 70)


def test_signs_do_not_matter() -> None:
    """A gated neuron's h may be negative."""
    samples = Samples(1, 2, np.array([2, 3], np.float32))
    samples.add(np.ones((1, 2), np.float32), np.array([[-1.5, 1]], np.float32))
    assert samples.importance(slice(None)).tolist() == [[3, 3]]


def test_one_token_too_many() -> None:
    layer, x = relu_layer(), text(0, 4)
    samples = layer.samples(x[:2], room=3)
    with pytest.raises(ValueError, match="room for 3 tokens, and 4 have come"):
        samples.add(x[2:], layer.h(x[2:]))
    assert samples.count == 2


def test_what_is_not_zero_stays_so() -> None:
    values = np.array([0, 1e-45, 1e-38, 1 + 2**-20, 3.0, 1e38], np.float32)
    found = from_bfloat16(to_bfloat16(values))
    assert np.array_equal(found > 0, values > 0)
    assert (found >= values).all()
    np.testing.assert_allclose(found[2:], values[2:], rtol=2**-7)
