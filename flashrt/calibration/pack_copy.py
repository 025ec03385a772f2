"""What a calibrated pack takes from the pack that it is made of, byte by byte: all but the feed-forward blocks."""

from __future__ import annotations

import zlib

import numpy as np

from flashrt.errors import PackError
from flashrt.spec import ModelSpec
from flashrt.storage.layout import Block, TensorLayout
from flashrt.storage.pack import Pack
from flashrt_kernels.ops import Ops
from flashrt_kernels.rows import MATRIX_ROWS, row_bytes

Array = np.ndarray


class PackCopy:
    """What the packer asks of a checkpoint, and its encoder, with the contents of `base`."""

    def __init__(self, base: Pack) -> None:
        self.base = base
        self.spec: ModelSpec = base.spec
        manifest = base.manifest
        self.name, self.source, self.fingerprint = manifest.name, manifest.source, manifest.hash

    def text_files(self) -> dict[str, bytes]:
        for name in self.base.manifest.text_files:
            self.base.check_text(name)
        return {name: (self.base.path / name).read_bytes() for name in self.base.manifest.text_files}

    def vector(self, key: str) -> Array:
        return read_vector(self.base, key)

    def fill(self, tensor: TensorLayout, run: int, first: int, bundles: Array) -> None:
        """See `flashrt.storage.packer.Encoder`."""
        known = self.base.layout.tensors[tensor.name]
        index = run * known.run_blocks + first // known.block_bundles
        bundles[:] = read_block(self.base, known.block(index)).reshape(-1, known.stride)[: len(bundles)]


def read_bundles(pack: Pack, name: str) -> Array:
    """A tensor, uint8 [bundles, stride]. Raises PackError where it is damaged."""
    tensor = pack.layout.tensors[name]
    return np.concatenate([read_block(pack, tensor.block(n)) for n in range(tensor.blocks)]).reshape(-1, tensor.stride)


def read_matrix(pack: Pack, name: str, rows: int, kernels: Ops[Array]) -> Array:
    """A matrix as float32 [rows, columns]. Raises PackError where it is damaged."""
    tensor = pack.layout.tensors[name]
    size = row_bytes(tensor.codec, tensor.columns)
    encoded = read_bundles(pack, name)[:, : MATRIX_ROWS * size].reshape(-1, size)[:rows]
    matrix = np.empty((rows, tensor.columns), np.float32)
    kernels.dequantize(encoded, tensor.codec, tensor.columns, matrix)
    return matrix


def read_block(pack: Pack, piece: Block) -> Array:
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
