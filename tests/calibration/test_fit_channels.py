"""What calibration computes itself is what the kernels compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashrt_kernels.activations import FUNCTIONS
from flashrt_kernels.curves import function
from flashrt_kernels.reference.glu import activate


@pytest.mark.parametrize("activation", [*FUNCTIONS, "fatrelu:0.7"])
def test_activations(activation: str) -> None:
    x = np.random.default_rng(0).standard_normal((3, 41)).astype(np.float32) * 3
    expected = activate(torch.from_numpy(x), activation).numpy()
    found = function(activation)(x)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
