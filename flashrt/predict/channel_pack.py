"""A calibrated pack's contents: the base pack's own bytes, and its feed-forward blocks in the order that was fitted."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from flashrt.errors import PackError
from flashrt.predict.channels import Block, ChannelFit
from flashrt.sparsity import ChannelSparsity
from flashrt.spec import ModelSpec
from flashrt.storage.layout import Block as Piece
from flashrt.storage.layout import TensorLayout
from flashrt.storage.pack import Pack
from flashrt_kernels.channels import ChannelVectors, encode_channels

Array = np.ndarray


class ChannelPackSource:
    """What the packer asks of a checkpoint, and its encoder.

    `fit(i)` gives what was fitted to block i, `layers` how many of its channels are stored whole.
    """

    def __init__(self, base: Pack, fit: Callable[[int], ChannelFit], layers: Sequence[ChannelSparsity]) -> None:
        self.base, self.fit, self.layers = base, fit, layers
        self.spec: ModelSpec = base.spec
        manifest = base.manifest
        self.name, self.source, self.fingerprint = manifest.name, manifest.source, manifest.hash
        self._at = -1
        self._groups: Array = np.empty((0, 0), np.uint8)
        self._vectors: dict[str, Array] = {}

    def text_files(self) -> dict[str, bytes]:
        for name in self.base.manifest.text_files:
            self.base.check_text(name)
        return {name: (self.base.path / name).read_bytes() for name in self.base.manifest.text_files}

    def vector(self, key: str) -> Array:
        layer = key.partition(".")[0]
        if layer.isdigit():
            self._encode(int(layer))
            if key in self._vectors:
                return self._vectors[key]
        return read_vector(self.base, key)

    def matrix_rows(self, key: str, start: int, stop: int) -> Array:
        raise NotImplementedError("a calibrated pack takes its matrices as they are encoded")

    def neuron_rows(self, layer: int, expert: int, start: int, stop: int) -> tuple[Array | None, Array, Array]:
        raise NotImplementedError("a calibrated pack takes its neurons as they are encoded")

    def fill(self, tensor: TensorLayout, run: int, first: int, bundles: Array) -> None:
        """See `flashrt.storage.packer.Encoder`."""
        layer, _, kind = tensor.name.partition(".")
        if kind == "channels":
            self._encode(int(layer))
            bundles[:] = self._groups[first : first + len(bundles)]
        elif kind == "down":
            self._encode(int(layer))
            rows = self._down[first : first + len(bundles)]
            bundles[:, : rows.shape[1]] = rows
        else:
            known = self.base.layout.tensors[tensor.name]
            index = run * known.run_blocks + first // known.block_bundles
            bundles[:] = read_block(self.base, known.block(index)).reshape(-1, known.stride)[: len(bundles)]

    def _encode(self, i: int) -> None:
        """Make block `i` the one at hand."""
        if self._at == i:
            return
        block, fit = read_ffn(self.base, i), self.fit(i)
        self._groups, vectors = encode_channels(block.parts(), fit.order, self.layers[i].fine)
        self._down = block.down
        self._vectors = _named(i, fit, vectors, self.spec.hidden)
        self._at = i


def _named(i: int, fit: ChannelFit, vectors: ChannelVectors, hidden: int) -> dict[str, Array]:
    return {
        f"{i}.channels.scale": vectors.scale,
        f"{i}.channels.ratio": vectors.ratio,
        f"{i}.channels.norms": fit.norms,
        f"{i}.channels.order": np.where(fit.order < hidden, fit.order, -1).astype(np.float32),
        f"{i}.down.norms": fit.down_norms,
    }


def read_ffn(pack: Pack, i: int) -> Block:
    """The weights of dense block `i`. Raises PackError where they are damaged."""
    tensor = pack.layout.tensors[f"{i}.ffn"]
    bundles = np.concatenate([read_block(pack, tensor.block(n)) for n in range(tensor.blocks)])
    return Block(pack.spec.layers[i].ffn, pack.spec.hidden, bundles.reshape(-1, tensor.stride))


def read_block(pack: Pack, piece: Piece) -> Array:
    """One block, uint8 [nbytes], compared with its checksum. Raises PackError."""
    path = pack.path / piece.file
    data = np.fromfile(path, np.uint8, piece.nbytes, offset=piece.offset)
    if zlib.crc32(data.data) != pack.block_crc(piece.tensor, piece.index):
        raise PackError(
            f"{path} is damaged: block {piece.index} of {piece.tensor} does not match its checksum. "
            "Pack the checkpoint again"
        )
    return data


def read_vector(pack: Pack, name: str) -> Array:
    """A vector, float32 [length]."""
    vector = pack.layout.vectors[name]
    return np.fromfile(pack.path / vector.file, "<f4", vector.length, offset=vector.offset)
