"""Rows of down as a file has them: the bits of `glu` on bundles of groups, however the rows are cut."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt_kernels import cpu, reference
from flashrt_kernels.ffn import FfnWeights, RoutedTokens
from flashrt_kernels.rows import KEPT, MATRIX_ROWS, Codec, NeuronCodecs, row_bytes
from tests.kernels.kept import kept_rows

K, ACTIVATION = 256, "silu"


class Neurons:
    """Gate, up and down of some neurons as a file has them, uint8 [rows, bytes], and as bundles."""

    def __init__(self, codec: Codec, down: Codec, group: int, neurons: int, gated: bool) -> None:
        self.gate, self.up = (kept_rows(seed, neurons, K, codec, size=0.1) for seed in (1, 2))
        self.down = kept_rows(3, K, neurons, down, size=0.1)
        along = [self.gate, self.up] if gated else [self.up]
        parts = self.down.reshape(K, neurons // group, -1).swapaxes(0, 1).reshape(neurons // group, -1)
        self.bundles = np.concatenate([*(rows.reshape(neurons // group, -1) for rows in along), parts], axis=1)
        self.codecs = NeuronCodecs(codec if gated else None, codec, down, group)
        self.gated, self.neurons = gated, neurons


CASES = [
    (Codec.Q4_K, Codec.Q6_K, 256, 768, True),
    (Codec.Q4_0, Codec.Q8_0, 128, 4480, True),
    (Codec.Q5_0, Codec.IQ4_NL, 64, 192, True),
    (Codec.Q6_K, Codec.MXFP4, 128, 384, False),
]


@pytest.fixture(params=cpu.available_isas())
def isa(request: pytest.FixtureRequest):
    cpu.force_isa(request.param)
    yield
    cpu.force_isa(None)


def by_matrices(own: Neurons, x: np.ndarray, y: np.ndarray, routed: RoutedTokens | None, wide: bool, cut: int) -> None:
    """y += block of x, down in calls of `cut` rows."""
    tokens = None if routed is None else routed.tokens
    x = x if tokens is None else x[tokens]
    linear = cpu.gemm_linear if wide else cpu.linear
    h, ups = np.empty((2, len(x), own.neurons), np.float32)
    for rows, out in ((own.gate, h), (own.up, ups)):
        linear(x, rows.reshape(-1, MATRIX_ROWS * rows.shape[1]), own.codecs.up, out, 0, own.neurons)
    if own.gated:
        cpu.activate(h, ups, ACTIVATION)
    else:
        h = ups
        cpu.activate(h, None, ACTIVATION)
    if routed is not None:
        h *= routed.factors[:, None]
    for begin in range(0, K, cut):
        part = own.down[begin : begin + cut]
        (cpu.gemm_linear_add if wide else cpu.linear_add)(h, part, own.codecs.down, own.codecs.group, y, begin, tokens)


@pytest.mark.parametrize(("codec", "down", "group", "neurons", "gated"), CASES)
@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize("chosen", [None, [2, 0, 4]])
def test_bits_are_those_of_bundles(
    isa: None, codec: Codec, down: Codec, group: int, neurons: int, gated: bool, wide: bool, chosen: list[int] | None
) -> None:
    own, rng = Neurons(codec, down, group, neurons, gated), np.random.default_rng(5)
    x, before = (rng.standard_normal((21 if wide else 5, K), np.float32) for _ in range(2))
    routed = None
    if chosen is not None:
        routed = RoutedTokens(np.array(chosen, np.int32), rng.standard_normal(len(chosen)).astype(np.float32))
    expected = before.copy()
    glu = cpu.gemm_glu if wide else cpu.glu
    glu(x, FfnWeights(own.bundles, own.codecs, ACTIVATION, gated), expected, routed)
    for cut in (K, 72, 8):
        y = before.copy()
        by_matrices(own, x, y, routed, wide, cut)
        assert np.array_equal(y, expected)


@pytest.mark.parametrize("wide", [False, True])
def test_close_to_the_reference(wide: bool) -> None:
    import torch

    own, rng = Neurons(*CASES[0]), np.random.default_rng(6)
    h = rng.standard_normal((7, own.neurons), np.float32)
    y = rng.standard_normal((9, K + 5), np.float32)
    tokens = np.array([8, 1, 0, 5, 2, 3, 7], np.int32)
    expected = torch.from_numpy(y.copy())
    form = own.codecs.down, own.codecs.group
    theirs = reference.gemm_linear_add if wide else reference.linear_add
    theirs(torch.from_numpy(h), torch.from_numpy(own.down), *form, expected, 5, torch.from_numpy(tokens))
    (cpu.gemm_linear_add if wide else cpu.linear_add)(h, own.down, *form, y, 5, tokens)
    assert np.abs(y - expected.numpy()).max() < (0.2 if wide else 1e-3) * np.abs(h).max()


def test_what_does_not_fit_is_refused() -> None:
    own, y = Neurons(*CASES[0]), np.zeros((2, K), np.float32)
    h = np.zeros((2, own.neurons), np.float32)
    with pytest.raises(ValueError, match="group: expected a divisor of 768"):
        cpu.linear_add(h, own.down, Codec.Q6_K, 512, y, 0)
    with pytest.raises(ValueError, match="y: 256 columns cannot take rows 8 to 264"):
        cpu.linear_add(h, own.down, Codec.Q6_K, 256, y, 8)
    with pytest.raises(ValueError, match="codec: expected a kept codec"):
        cpu.linear_add(h, np.zeros((K, row_bytes(Codec.INT8, own.neurons)), np.uint8), Codec.INT8, 256, y, 0)
    with pytest.raises(ValueError, match="x"):
        cpu.linear_add(h[:1], own.down, Codec.Q6_K, 256, y, 0)
    with pytest.raises(ValueError, match="named twice"):
        cpu.linear_add(h, own.down, Codec.Q6_K, 256, y, 0, np.array([1, 1], np.int32))
    assert KEPT[Codec.Q6_K].weights == 256
