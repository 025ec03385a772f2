"""The expert that every token of a mixture goes to, whatever the router says."""

from __future__ import annotations

import numpy as np

from flashrt.model.ffn.neurons import neurons_of
from flashrt.model.ffn.router import sigmoid
from flashrt.model.workspace import Tensor, Workspace
from flashrt_kernels.ffn import RoutedTokens


class SharedExpert:
    """That of layer `i`. Its weights come through the ring of the planner, behind those of the router."""

    def __init__(self, work: Workspace, i: int) -> None:
        self._work, self._gate = work, f"{i}.shared_gate" if work.spec.layers[i].ffn.shared_gate else None
        self._neurons = neurons_of(work, i, "shared")

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of its weights, in the order in which it takes them."""
        return (*([] if self._gate is None else [self._gate]), *self._neurons.tensors)

    def add(self, x: Tensor, y: Tensor, wide: bool) -> None:
        """y += expert of x, both float32 [T, hidden]."""
        self._neurons.add(x, y, wide, None if self._gate is None else self._weighted(x, wide))

    def _weighted(self, x: Tensor, wide: bool) -> RoutedTokens:
        """All tokens, each by the sigmoid of its product with the gate."""
        assert self._gate is not None
        work, make = self._work, self._work.device.make
        logits = work.view("router", len(x), 1)
        work.linear(self._gate, x, logits, wide)
        factors = sigmoid(work.device.get(logits)[:, 0])
        return RoutedTokens(make(np.arange(len(x), dtype=np.int32)), make(factors))
