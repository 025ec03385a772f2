"""Which neurons of a layer a pass needs, before they are computed."""

from __future__ import annotations

from typing import Protocol

import numpy as np

Array = np.ndarray


class Predictor(Protocol):
    """Names the neurons of one layer that matter to some token of a pass. `nbytes` is the memory that it takes."""

    nbytes: int

    def predict(self, hidden: Array) -> Array:
        """Neurons, int32 ascending, for inputs of the FFN (normed) or of what it was fitted to, float32 [B, K].

        Those of all tokens together: a token may compute neurons that only another one needs.
        """
