"""Where every tensor of a pack lies: pure arithmetic over a spec, shared by packer, planner and tools.

A tensor is a row of bundles (see `flashrt_kernels.rows`) cut into *blocks*, the unit in which it is pinned, read and
checksummed. Every tensor, and every run of an expert's neurons, is padded with zero bundles to a multiple of 4 KiB, so
every block starts and ends on a 4 KiB boundary of its file and can be read with O_DIRECT straight into a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from flashrt.spec import ModelSpec
from flashrt.storage.safetensors_file import PAGE, header_bytes
from flashrt_kernels.rows import MATRIX_ROWS, Codec, align, bundle_stride

BLOCK_BYTES = 1 << 20  # large enough for full disk bandwidth at a small depth, small enough to keep the ring small
NEURON_STEP = 128  # neurons: kernels give the same bits however a run is cut at multiples of this
MATRIX_STEP = 8  # bundles of eight rows, likewise
RESIDENT_FILE = "resident.safetensors"


def layer_file(i: int) -> str:
    return f"layer-{i:03d}.safetensors"


@dataclass(frozen=True, slots=True)
class Block:
    """A contiguous run of bundles of one tensor: what one read brings."""

    tensor: str
    index: int  # among the tensor's blocks
    file: str
    offset: int  # bytes from the start of the file
    nbytes: int
    first: int  # bundle
    bundles: int


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """Shape and place of one packed tensor. `offset` counts from the start of its file."""

    name: str
    file: str
    offset: int
    codec: Codec
    columns: int  # weights per row
    bundle_rows: int
    runs: int  # experts; 1 for everything else
    run_bundles: int  # bundles of one run that hold weights
    run_stride: int  # bundles from one run to the next: run_bundles and its padding
    block_bundles: int

    @property
    def stride(self) -> int:
        return bundle_stride(self.codec, self.columns, self.bundle_rows)

    @property
    def bundles(self) -> int:
        return self.runs * self.run_stride

    @property
    def nbytes(self) -> int:
        return self.bundles * self.stride

    @property
    def run_blocks(self) -> int:
        return -(-self.run_stride // self.block_bundles)

    @property
    def blocks(self) -> int:
        return self.runs * self.run_blocks

    @property
    def max_block_bytes(self) -> int:
        return min(self.block_bundles, self.run_stride) * self.stride

    def block(self, index: int) -> Block:
        run, position = divmod(index, self.run_blocks)
        first = run * self.run_stride + position * self.block_bundles
        bundles = min(self.block_bundles, self.run_stride - position * self.block_bundles)
        offset = self.offset + first * self.stride
        return Block(self.name, index, self.file, offset, bundles * self.stride, first, bundles)

    def run_block_range(self, run: int) -> range:
        return range(run * self.run_blocks, (run + 1) * self.run_blocks)


@dataclass(frozen=True, slots=True)
class VectorLayout:
    """Place of a float32 vector of `length` numbers."""

    name: str
    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class PackLayout:
    """All tensors and vectors of a pack, in execution order."""

    tensors: dict[str, TensorLayout]
    vectors: dict[str, VectorLayout]
    file_bytes: dict[str, int]  # data plus header

    @property
    def nbytes(self) -> int:
        return sum(self.file_bytes.values())

    def tensors_of(self, file: str) -> Iterator[TensorLayout]:
        return (t for t in self.tensors.values() if t.file == file)

    def vectors_of(self, file: str) -> Iterator[VectorLayout]:
        return (v for v in self.vectors.values() if v.file == file)


def codec_of(name: str, dtype: Codec) -> Codec:
    """The codec of a tensor in a pack of `dtype`.

    The router decides which experts run: an error there changes everything, and its bytes are negligible.
    """
    if name.endswith(".router") and dtype is not Codec.F32:
        return Codec.BF16
    return dtype


def _tensor(
    name: str, file: str, codec: Codec, columns: int, bundle_rows: int, runs: int, bundles: int, block_bytes: int
) -> TensorLayout:
    stride = bundle_stride(codec, columns, bundle_rows)
    page_bundles = PAGE // math.gcd(stride, PAGE)
    step = math.lcm(page_bundles, MATRIX_STEP if bundle_rows == MATRIX_ROWS else NEURON_STEP)
    block_bundles = max(block_bytes // stride // step, 1) * step
    return TensorLayout(
        name, file, 0, codec, columns, bundle_rows, runs, bundles, align(bundles, page_bundles), block_bundles
    )


def _file_tensors(
    spec: ModelSpec, dtype: Codec, file: str, layer: int | None, block_bytes: int
) -> Iterator[TensorLayout]:
    matrices = spec.shared_matrices() if layer is None else spec.layer_matrices(layer)
    for name, (rows, columns) in matrices.items():
        bundles = -(-rows // MATRIX_ROWS)
        yield _tensor(name, file, codec_of(name, dtype), columns, MATRIX_ROWS, 1, bundles, block_bytes)
    if layer is not None:
        ffn = spec.layers[layer].ffn
        codec = codec_of("ffn", dtype)
        yield _tensor(f"{layer}.ffn", file, codec, spec.hidden, ffn.bundle_rows, ffn.runs, ffn.neurons, block_bytes)


def pack_layout(spec: ModelSpec, dtype: Codec, block_bytes: int = BLOCK_BYTES) -> PackLayout:
    """Lay out a pack of `spec` with weights of `dtype`, aiming at blocks of `block_bytes`."""
    lengths = spec.vectors()
    tensors: dict[str, TensorLayout] = {}
    vectors: dict[str, VectorLayout] = {}
    file_bytes: dict[str, int] = {}
    for layer in (None, *range(len(spec.layers))):
        file = RESIDENT_FILE if layer is None else layer_file(layer)
        prefix = "norm.final" if layer is None else f"{layer}."
        own = list(_file_tensors(spec, dtype, file, layer, block_bytes))
        own_vectors = {name: n for name, n in lengths.items() if name.startswith(prefix)}
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {t.name: ("U8", (t.bundles, t.stride)) for t in own}
        shapes |= {name: ("F32", (n,)) for name, n in own_vectors.items()}
        offset = header_bytes(shapes)
        for tensor in own:
            tensors[tensor.name] = replace(tensor, offset=offset)
            offset += tensor.nbytes
        for name, length in own_vectors.items():
            vectors[name] = VectorLayout(name, file, offset, length)
            offset += 4 * length
        file_bytes[file] = offset
    return PackLayout(tensors, vectors, file_bytes)
