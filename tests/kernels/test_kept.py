"""Kept codecs against the gguf package, and kernels on them against the weights that it decodes."""

import numpy as np
import pytest
import torch

from flashrt_kernels import reference
from flashrt_kernels.rows import KEPT, Codec, row_bytes

from .helpers import same
from .kept import as_gguf, kept_rows

CODECS = list(KEPT)


def widths(codec: Codec) -> tuple[int, ...]:
    """Odd numbers of blocks, in whole spans of 256 weights and not."""
    step = KEPT[codec].weights
    return step, 3 * step, 5 * step, 20 * step


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("n", [1, 7, 33])
def test_the_reference_decodes_as_the_gguf_package_does(codec, n):
    for k in widths(codec):
        rows = kept_rows(n + k, n, k, codec)
        found = torch.empty(n, k)
        reference.dequantize(torch.from_numpy(rows), codec, k, found)
        assert same(found.numpy(), as_gguf(rows, codec))


@pytest.mark.parametrize("codec", CODECS)
def test_rows_are_whole_blocks(codec):
    with pytest.raises(ValueError, match=f"not whole blocks of {codec.value}"):
        row_bytes(codec, KEPT[codec].weights + 16)


def test_every_scale_of_mxfp4():
    rows = np.zeros((253, 17), np.uint8)  # larger ones reach infinity
    rows[:, 0] = np.arange(253)
    rows[:, 1:] = np.arange(16) * 17
    found = torch.empty(253, 32)
    reference.dequantize(torch.from_numpy(rows), Codec.MXFP4, 32, found)
    assert same(found.numpy(), as_gguf(rows, Codec.MXFP4))
