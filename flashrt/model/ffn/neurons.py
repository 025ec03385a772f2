"""Neurons of a layer as they are stored: in bundles, or in three matrices."""

from __future__ import annotations

from flashrt.model.ffn.dense import DenseBlock
from flashrt.model.ffn.matrices import MatricesBlock
from flashrt.model.workspace import Workspace


def neurons_of(work: Workspace, i: int, name: str) -> DenseBlock | MatricesBlock:
    """Those called `name` of layer `i`."""
    return DenseBlock(work, i, name) if f"{i}.{name}" in work.layout.tensors else MatricesBlock(work, i, name)
