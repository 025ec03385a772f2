"""Where every tensor of a pack lies: pure arithmetic over a spec, shared by packer, planner and tools.

A tensor is a row of bundles (see `flashrt_kernels.rows`) cut into *blocks*, the unit in which it is pinned, read and
checksummed. Every tensor, and every run of an expert's neurons, is padded with zero bundles to a multiple of 4 KiB, so
every block starts and ends on a 4 KiB boundary of its file and can be read with O_DIRECT straight into a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flashrt.sparsity import ChannelSparsity, RowSparsity, Sparsity
from flashrt.spec import GATES, ROUTING, Attention, ModelSpec
from flashrt.storage.kept import Kept, parts_of, whole_of
from flashrt.storage.safetensors_file import PAGE, header_bytes
from flashrt_kernels.channels import CHANNELS, channel_groups, group_bytes, padded_columns
from flashrt_kernels.limits import DOWN_STEP, MATRIX_STEP, NEURON_STEP
from flashrt_kernels.rows import MATRIX_ROWS, Codec, NeuronCodecs, align, bundle_stride, neuron_bytes

BLOCK_BYTES = 1 << 20  # large enough for full disk bandwidth at a small depth, small enough to keep the ring small
PREDICTOR = ".predictor."  # in the names of all that belongs to one
RESIDENT_FILE = "resident.safetensors"
AHEAD_DIR = "ahead"  # in a pack, the pack of the layer that predicts further tokens
NEURON_PARTS = ("gate", "up", "down")  # end the names of matrices of neurons, behind a colon


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
    tail: int = 0  # bytes of the last bundle that are none of the file's

    @property
    def shift(self) -> int:
        """Where it begins in memory whose page is one of the file: what is so placed is read without a copy."""
        return self.offset % PAGE


@dataclass(frozen=True, slots=True)
class Turned:
    """Rows that a file has in pairs, where a pack has first all first ones: `rotary` of each head, behind `fixed`."""

    heads: int
    rotary: int
    fixed: int

    def places(self, rows: int) -> np.ndarray:
        """Where each row of the file stands in a pack, int64 [rows]."""
        first, within = np.divmod(np.arange(rows), rows // self.heads)
        pair, second = np.divmod(within - self.fixed, 2)
        paired = (within >= self.fixed) & (within < self.fixed + self.rotary)
        moved = np.where(paired, self.fixed + second * (self.rotary // 2) + pair, within)
        return first * (rows // self.heads) + moved


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
    stride: int  # bytes from one bundle to the next
    rows: int = 0  # of a matrix
    row0: int = 0  # of a part: its first row in the whole
    codecs: NeuronCodecs | None = None  # of neurons whose rows have several codecs
    source: int | None = None  # which of the model's files it lies in, of an outline
    turned: Turned | None = None  # how the rows of a file are ordered otherwise than those of a pack
    summed: int = 0  # of rows of down: numbers that are summed by themselves, as those of a bundle are in a pack

    @property
    def tail(self) -> int:
        """Bytes of the last bundle of a run that a file does not have."""
        return 0 if self.source is None else -self.rows % self.bundle_rows * (self.stride // self.bundle_rows)

    @property
    def matrix(self) -> str:
        """The logical matrix that it is, or is a part of."""
        return whole_of(self.name)

    @property
    def group(self) -> int:
        """Neurons of a bundle."""
        return 1 if self.codecs is None else self.codecs.group

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
        """Bytes of memory for any of its blocks, wherever that begins in a page."""
        room = 0 if self.source is None else PAGE
        return min(self.block_bundles, self.run_stride) * self.stride + room

    def block(self, index: int) -> Block:
        run, position = divmod(index, self.run_blocks)
        first = run * self.run_stride + position * self.block_bundles
        bundles = min(self.block_bundles, self.run_stride - position * self.block_bundles)
        offset = self.offset + first * self.stride
        tail = self.tail if position == self.run_blocks - 1 else 0
        return Block(self.name, index, self.file, offset, bundles * self.stride - tail, first, bundles, tail)

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
    rows: tuple[RowSparsity, ...] = ()  # of a pack that is calibrated by row, its layers

    @property
    def nbytes(self) -> int:
        return sum(self.file_bytes.values())

    @property
    def channel_columns(self) -> int:
        """The most columns of any layer's channel groups; 0 in a pack that has none."""
        return max((t.columns for t in self.tensors.values() if t.name.endswith(".channels")), default=0)

    def parts(self, matrix: str) -> list[TensorLayout]:
        """The tensors that a matrix is stored in, in the order of its rows: itself, or its parts."""
        if matrix in self.tensors:
            return [self.tensors[matrix]]
        return [self.tensors[part] for part in parts_of(matrix) if part in self.tensors]

    def neurons(self, name: str) -> list[TensorLayout]:
        """The tensors that neurons are stored in: bundles, or their gates, ups and downs each in one matrix."""
        if name in self.tensors:
            return [self.tensors[name]]
        return [self.tensors[part] for part in map(f"{name}:{{}}".format, NEURON_PARTS) if part in self.tensors]

    def tensors_of(self, file: str) -> Iterator[TensorLayout]:
        return (t for t in self.tensors.values() if t.file == file)

    def vectors_of(self, file: str) -> Iterator[VectorLayout]:
        return (v for v in self.vectors.values() if v.file == file)


def codec_of(name: str, dtype: Codec) -> Codec:
    """The codec of a tensor in a pack of `dtype`.

    Routers, and gates of shared experts, decide what runs, and gates of a delta net what its state keeps: an error
    there changes everything, and their bytes are negligible. Predictors have 4 bits whatever the pack has: see
    `flashrt.model.predictors.low_rank`.
    """
    if name.endswith((*ROUTING, *GATES)) and dtype is not Codec.F32:
        return Codec.BF16
    if PREDICTOR in name:
        return Codec.INT4
    return dtype


@dataclass(frozen=True, slots=True)
class _Shape:
    """A tensor before it has a place: `bundles` a run, cut into blocks at multiples of `step`."""

    name: str
    codec: Codec
    columns: int
    bundle_rows: int
    bundles: int
    stride: int
    step: int
    runs: int = 1
    rows: int = 0
    row0: int = 0
    codecs: NeuronCodecs | None = None

    def placed(self, file: str, block_bytes: int) -> TensorLayout:
        page_bundles = PAGE // math.gcd(self.stride, PAGE)
        step = math.lcm(page_bundles, self.step)
        block_bundles = max(block_bytes // self.stride // step, 1) * step
        return TensorLayout(
            self.name,
            file,
            0,
            self.codec,
            self.columns,
            self.bundle_rows,
            self.runs,
            self.bundles,
            align(self.bundles, page_bundles),
            block_bundles,
            self.stride,
            self.rows,
            self.row0,
            self.codecs,
        )


def _matrix(name: str, codec: Codec, rows: int, columns: int, row0: int = 0) -> _Shape:
    stride = bundle_stride(codec, columns, MATRIX_ROWS)
    bundles = -(-rows // MATRIX_ROWS)
    return _Shape(name, codec, columns, MATRIX_ROWS, bundles, stride, MATRIX_STEP, rows=rows, row0=row0)


def _matrices(matrices: dict[str, tuple[int, int]], dtype: Codec) -> Iterator[_Shape]:
    for name, (rows, columns) in matrices.items():
        yield _matrix(name, codec_of(name, dtype), rows, columns)


def _kept_matrices(matrices: dict[str, tuple[int, int]], dtype: Codec, kept: Kept, spec: ModelSpec) -> Iterator[_Shape]:
    """Those that a file has, in its codecs; queries, keys and values apart where these differ."""
    for name, (rows, columns) in matrices.items():
        parts = parts_of(name)
        if name in kept.matrices or not any(part in kept.matrices for part in parts):
            yield _matrix(name, kept.matrices.get(name, codec_of(name, dtype)), rows, columns)
            continue
        row0 = 0
        for part, rows in zip(parts, spec.layers[int(name.partition(".")[0])].mixer.qkv_parts, strict=True):
            if rows:
                yield _matrix(part, kept.matrices.get(part, dtype), rows, columns, row0)
            row0 += rows


def _kept_neurons(spec: ModelSpec, codecs: NeuronCodecs, i: int, name: str) -> _Shape:
    """Neurons whose rows have several codecs; groups of them begin on pages, as they are large and read one by one."""
    hidden, group = spec.hidden, codecs.group
    runs, neurons = spec.layer_neurons(i)[name]
    stride = align(neuron_bytes(codecs, hidden), 64 if group == 1 else PAGE)
    step, rows = NEURON_STEP if group == 1 else 1, group * spec.layers[i].ffn.bundle_rows
    return _Shape(name, codecs.up, hidden, rows, neurons // group, stride, step, runs, codecs=codecs)


def _layer_neurons(
    spec: ModelSpec, dtype: Codec, i: int, sparsity: Sparsity | None, kept: Kept | None
) -> Iterator[_Shape]:
    """The neurons of a layer, in execution order."""
    if sparsity is not None:
        yield from _calibrated_ffn(spec, dtype, i, sparsity)
        return
    for name in spec.layer_neurons(i):
        codecs = None if kept is None else kept.neurons.get(name)
        yield _neurons(spec, dtype, i, name) if codecs is None else _kept_neurons(spec, codecs, i, name)


def _calibrated_ffn(spec: ModelSpec, dtype: Codec, i: int, sparsity: Sparsity) -> Iterator[_Shape]:
    """Neurons as bundles, behind their predictor; or gate and up by channel, and down by row."""
    ffn, hidden = spec.layers[i].ffn, spec.hidden
    layer = sparsity.layers[i]
    if isinstance(layer, ChannelSparsity):
        columns = channel_columns(spec, i)
        stride = group_bytes(columns, layer.fine)
        yield _Shape(f"{i}.channels", dtype, columns, CHANNELS + layer.fine, channel_groups(hidden), stride, 1)
        yield _Shape(f"{i}.down", dtype, hidden, 1, ffn.neurons, bundle_stride(dtype, hidden, 1), DOWN_STEP)
        return
    if isinstance(layer, RowSparsity):
        if layer.heads_from is not None:
            yield from _matrices({f"{i}{PREDICTOR}heads": (spec.layers[i].attention.heads, hidden)}, dtype)
        factors = {f"{i}{PREDICTOR}down": (layer.rank, hidden), f"{i}{PREDICTOR}up": (ffn.neurons, layer.rank)}
        yield from _matrices(factors, dtype)
    yield _neurons(spec, dtype, i, f"{i}.ffn")


def _neurons(spec: ModelSpec, dtype: Codec, i: int, name: str) -> _Shape:
    """Neurons of which all rows have one codec."""
    rows, (runs, neurons) = spec.layers[i].ffn.bundle_rows, spec.layer_neurons(i)[name]
    return _Shape(name, dtype, spec.hidden, rows, neurons, bundle_stride(dtype, spec.hidden, rows), NEURON_STEP, runs)


def heads_apart(attention: Attention) -> bool:
    """Whether a head can be computed alone: its queries are whole bundles, its keys and values no other's."""
    apart = attention.kv_heads == attention.heads and not (
        attention.keys_only or attention.qk_norm_whole or attention.output_gate
    )
    return apart and attention.head_dim % MATRIX_ROWS == 0


def channel_columns(spec: ModelSpec, i: int) -> int:
    """Columns of the channel groups of layer `i`: those of gate and up, padded."""
    ffn = spec.layers[i].ffn
    return padded_columns(ffn.neurons) * (ffn.bundle_rows - 1)


def sparse_vectors(spec: ModelSpec, i: int, sparsity: Sparsity) -> dict[str, int]:
    """Logical name → length of the vectors that layer `i` has in a calibrated pack, beside those of the spec."""
    if sparsity.rows:
        result = {f"{i}{PREDICTOR}bias": spec.layers[i].ffn.neurons}
        if sparsity.rows[i].heads_from is not None:
            result[f"{i}{PREDICTOR}heads.bias"] = spec.layers[i].attention.heads
        return result
    columns = channel_columns(spec, i)
    return {
        f"{i}.channels.scale": columns,
        f"{i}.channels.ratio": columns,
        f"{i}.channels.norms": spec.hidden,
        f"{i}.channels.order": channel_groups(spec.hidden) * CHANNELS,
        f"{i}.down.norms": spec.layers[i].ffn.neurons,
    }


def pack_layout(
    spec: ModelSpec,
    dtype: Codec,
    block_bytes: int = BLOCK_BYTES,
    sparsity: Sparsity | None = None,
    kept: Kept | None = None,
) -> PackLayout:
    """Lay out a pack of `spec` with weights of `dtype`, aiming at blocks of `block_bytes`.

    `sparsity`, of a calibrated pack, says how its feed-forward blocks are stored; `kept` which tensors have the codecs
    of the file that they come from.
    """
    lengths = spec.vectors()
    tensors: dict[str, TensorLayout] = {}
    vectors: dict[str, VectorLayout] = {}
    file_bytes: dict[str, int] = {}
    for layer in (None, *range(len(spec.layers))):
        file = RESIDENT_FILE if layer is None else layer_file(layer)
        prefix = "norm." if layer is None else f"{layer}."
        matrices = spec.shared_matrices() if layer is None else spec.layer_matrices(layer)
        shapes_of = [*(_matrices(matrices, dtype) if kept is None else _kept_matrices(matrices, dtype, kept, spec))]
        own_vectors = {name: n for name, n in lengths.items() if name.startswith(prefix)}
        if layer is not None:
            shapes_of += _layer_neurons(spec, dtype, layer, sparsity, kept)
            if sparsity is not None:
                own_vectors |= sparse_vectors(spec, layer, sparsity)
        own, placed, file_bytes[file] = laid_out(
            file, [shape.placed(file, block_bytes) for shape in shapes_of], own_vectors
        )
        tensors |= own
        vectors |= placed
    return PackLayout(tensors, vectors, file_bytes, () if sparsity is None else sparsity.rows)


def laid_out(
    file: str, own: Sequence[TensorLayout], lengths: Mapping[str, int]
) -> tuple[dict[str, TensorLayout], dict[str, VectorLayout], int]:
    """Tensors and vectors in their places in a file of a pack, by name, and the bytes of the file."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {t.name: ("U8", (t.bundles, t.stride)) for t in own}
    shapes |= {name: ("F32", (n,)) for name, n in lengths.items()}
    offset = header_bytes(shapes)
    tensors, vectors = {}, {}
    for tensor in own:
        tensors[tensor.name] = replace(tensor, offset=offset)
        offset += tensor.nbytes
    for name, length in lengths.items():
        vectors[name] = VectorLayout(name, file, offset, length)
        offset += 4 * length
    return tensors, vectors, offset
