"""Where a GGUF file has the kept tensors of a pack, so that they are read from the file itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashrt.storage.kept import parts_of
from flashrt.storage.layout import (
    BLOCK_BYTES,
    NEURON_PARTS,
    PackLayout,
    TensorLayout,
    Turned,
    VectorLayout,
    laid_out,
)
from flashrt_kernels.limits import MATRIX_STEP
from flashrt_kernels.rows import MATRIX_ROWS, Codec, row_bytes

if TYPE_CHECKING:
    from flashrt.arch import Part
    from flashrt.storage.sources import Checkpoint

LARGEST_ROW = 128 << 10  # bytes: rows are read into small buffers


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` rows that follow one another from byte `offset` on, in one of the model's files.

    heads: `rotary` rows of each of so many heads, behind `fixed` others, are pairs, of which a pack has first all
    first ones
    """

    file: int
    offset: int
    row_bytes: int
    count: int
    heads: int = 0
    rotary: int = 0
    fixed: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.count * self.row_bytes


@dataclass(frozen=True, slots=True)
class Places:
    """Tensor of a pack → its rows: of a matrix in their order; of neurons for each run gate (if any), up and down.

    `files` is how many files these lie in.
    """

    files: int
    tensors: Mapping[str, tuple[Rows, ...]]

    def to_json(self) -> dict[str, Any]:
        return {"files": self.files, "tensors": {name: [*map(astuple, own)] for name, own in self.tensors.items()}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Places:
        tensors = {str(name): tuple(Rows(*rows) for rows in own) for name, own in data["tensors"].items()}
        return cls(data["files"], tensors)

    def problem(self, layout: PackLayout) -> str | None:
        """Why these cannot be the places of a pack's tensors, as one clause; None when they can."""
        if type(self.files) is not int or not 1 <= self.files <= 1 << 16:
            return f"weights in {self.files!r} files"
        for name, own in self.tensors.items():
            tensor = layout.tensors.get(name)
            if tensor is None:
                return f"{name} is no tensor of this model"
            numbers = (number for rows in own for number in astuple(rows))
            if not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
                return f"{name} has a place that is no whole number"
            if [(rows.row_bytes, rows.count) for rows in _merged(tensor, own)] != list(_wanted(tensor)):
                return f"{name} lies in rows of other sizes"
            if not _together(tensor, own):
                return f"{name} lies in more places than are read"
            if any(rows.file >= self.files or rows.row_bytes > LARGEST_ROW or not _permutes(rows) for rows in own):
                return f"{name} has a place that cannot be"
        return None


def _together(tensor: TensorLayout, own: Sequence[Rows]) -> bool:
    """Whether a matrix is one run of rows, or queries, keys and values; and runs of neurons follow one another."""
    if tensor.codecs is None:
        return len(own) <= len(parts_of(tensor.name))
    each = len(own) // tensor.runs
    follow = all(
        rows == replace(own[i % each], offset=own[i % each].offset + i // each * rows.count * rows.row_bytes)
        for i, rows in enumerate(own)
    )
    whole = all(rows.count % MATRIX_ROWS == 0 for rows in own)
    return follow and whole and not any(rows.heads for rows in own)


def _permutes(rows: Rows) -> bool:
    if not rows.heads:
        return rows.rotary == rows.fixed == 0
    fits = rows.fixed + rows.rotary <= rows.count // rows.heads
    return rows.count % rows.heads == 0 and fits and rows.rotary % 2 == 0


def _merged(tensor: TensorLayout, own: Sequence[Rows]) -> list[Rows]:
    """The rows of a matrix as one, where all have one size; those of neurons as they are."""
    if tensor.codecs is not None or len({rows.row_bytes for rows in own}) != 1:
        return list(own)
    return [Rows(0, 0, own[0].row_bytes, sum(rows.count for rows in own))]


def _wanted(tensor: TensorLayout) -> Iterator[tuple[int, int]]:
    """The (bytes of a row, rows) that the places of a tensor must have."""
    codecs, k = tensor.codecs, tensor.columns
    if codecs is None:
        yield row_bytes(tensor.codec, k), tensor.rows
        return
    neurons = tensor.run_bundles * codecs.group
    for _ in range(tensor.runs):
        for codec in neuron_codecs(tensor):
            yield row_bytes(codec, k), neurons
        yield row_bytes(codecs.down, neurons), k


def file_layout(packed: PackLayout, places: Places, block_bytes: int = BLOCK_BYTES) -> PackLayout:
    """The layout of an outline: what `packed`, that of the pack, has, with tensors in their places in the files.

    Neurons are three matrices there, one of gates (if any), one of ups and one of downs; queries, keys and values are
    apart. What has no place in the files is in those of the outline. Blocks have about `block_bytes`.
    """
    tensors: dict[str, TensorLayout] = {}
    vectors: dict[str, VectorLayout] = {}
    file_bytes = {}
    for file in packed.file_bytes:
        every = list(packed.tensors_of(file))
        own = [tensor for tensor in every if tensor.name not in places.tensors]
        lengths = {vector.name: vector.length for vector in packed.vectors_of(file)}
        held, placed, file_bytes[file] = laid_out(file, own, lengths)
        vectors |= placed
        for tensor in every:
            rows = places.tensors.get(tensor.name)
            found = [held[tensor.name]] if rows is None else _in_files(tensor, rows, block_bytes)
            tensors |= {part.name: part for part in found}
    return PackLayout(tensors, vectors, file_bytes)


def _in_files(tensor: TensorLayout, own: Sequence[Rows], block_bytes: int) -> Iterator[TensorLayout]:
    make = partial(_matrix_in_file, block_bytes, tensor.runs)
    if tensor.codecs is None:
        row0, names = tensor.row0, [tensor.name] if len(own) == 1 else parts_of(tensor.name)
        for name, rows in zip(names, own, strict=False):
            yield replace(make(name, rows, tensor.codec, tensor.columns), row0=row0)
            row0 += rows.count
        return
    codecs, neurons = tensor.codecs, tensor.run_bundles * tensor.codecs.group
    along = neuron_codecs(tensor)
    for part, rows, codec in zip(NEURON_PARTS[2 - len(along) :], own, along, strict=False):
        yield make(f"{tensor.name}:{part}", rows, codec, tensor.columns)
    yield replace(make(f"{tensor.name}:down", own[len(along)], codecs.down, neurons), summed=codecs.group)


def _matrix_in_file(block_bytes: int, runs: int, name: str, rows: Rows, codec: Codec, columns: int) -> TensorLayout:
    """`rows` are those of the first run; the others follow."""
    stride, bundles = MATRIX_ROWS * rows.row_bytes, -(-rows.count // MATRIX_ROWS)
    block = max(block_bytes // stride // MATRIX_STEP, 1) * MATRIX_STEP
    turned = Turned(rows.heads, rows.rotary, rows.fixed) if rows.heads else None
    return TensorLayout(
        name,
        source_file(rows.file),
        rows.offset,
        codec,
        columns,
        MATRIX_ROWS,
        runs,
        bundles,
        bundles,
        block,
        stride,
        rows.count,
        source=rows.file,
        turned=turned,
    )


def source_file(number: int) -> str:
    """What layouts call one of the model's files."""
    return f"source-{number}"


def neuron_codecs(tensor: TensorLayout) -> list[Codec]:
    """Codecs of the rows of neurons that run along the hidden dimension: of gate, if any, and up."""
    assert tensor.codecs is not None
    return [codec for codec in (tensor.codecs.gate, tensor.codecs.up) if codec is not None]


def places_of(source: Checkpoint, layout: PackLayout, files: Sequence[Path]) -> Places:
    """Where `files` (absolute paths) have those tensors of a pack of `source` that can be read from there.

    That is so where a tensor keeps the file's codec, and its rows follow one another or are permuted within heads.
    """
    found = {}
    for name, tensor in layout.tensors.items():
        own = _matrix(source, tensor, files) if tensor.rows else _neurons(source, tensor, files)
        if own is not None and Places(len(files), {name: own}).problem(layout) is None:
            found[name] = own
    return Places(len(files), found)


def _matrix(source: Checkpoint, tensor: TensorLayout, files: Sequence[Path]) -> tuple[Rows, ...] | None:
    own, first = [], 0
    for part, count in source.matrix_parts(tensor.matrix):
        if tensor.row0 <= first < tensor.row0 + tensor.rows:
            own.append(_rows(source, part, count, tensor.codec, files))
        first += count
    return None if None in own else tuple(rows for rows in own if rows is not None)


def _neurons(source: Checkpoint, tensor: TensorLayout, files: Sequence[Path]) -> tuple[Rows, ...] | None:
    codecs = tensor.codecs
    if codecs is None:  # quantized again
        return None
    neurons, own = tensor.run_bundles * codecs.group, []
    for run in range(tensor.runs):
        gate, up, down = source.names.neurons(tensor.name, run)
        along = [part for part in (gate, up) if part is not None]
        for part, codec in zip(along, neuron_codecs(tensor), strict=True):
            own.append(_rows(source, part, neurons, codec, files))
        own.append(_rows(source, down, tensor.columns, codecs.down, files))
    return None if None in own else tuple(rows for rows in own if rows is not None)


def _rows(source: Checkpoint, part: Part, count: int, codec: Codec, files: Sequence[Path]) -> Rows | None:
    from flashrt.storage.sources.stored import StoredTensor

    tensor = source.reader.tensors[part.tensor]
    if not isinstance(tensor, StoredTensor) or tensor.dtype.lower() != codec.value:
        return None
    if part.transposed or part.groups is not None or part.step != 1 or part.columns or (part.heads and part.rows):
        return None
    size = tensor.row_bytes
    if size > LARGEST_ROW:
        return None
    first = (part.expert or 0) * tensor.shape[-2] + (part.rows[0] if part.rows else 0)
    rotary, fixed = (part.rotary, part.fixed) if part.heads else (0, 0)
    file = files.index(Path(os.path.abspath(tensor.path)))
    return Rows(file, tensor.offset + first * size, size, count, part.heads, rotary, fixed)
