"""A checkpoint: a ModelSpec, and its logical tensors read by ranges."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from flashrt.arch import Part, TensorMap, ahead_tensors
from flashrt.errors import CheckpointError, CheckpointWarning, UnsupportedModelError
from flashrt.spec import ModelSpec
from flashrt.storage.sources.decoding import F32, Raw
from flashrt.storage.sources.stored import PLAIN_CODECS
from flashrt.storage.sources.tensors import TensorReader
from flashrt.text.files import TextFiles

_SHOWN = 5

Number = TypeVar("Number", np.float32, np.uint8)
Read = TypeVar("Read", np.float32, np.uint8, covariant=True)


class ReadRows(Protocol[Read]):
    """Reads rows start:stop of a stored matrix, or of slice `expert` of a stack of them."""

    def __call__(self, name: str, start: int, stop: int, expert: int | None = None) -> NDArray[Read]: ...


@dataclass(frozen=True, slots=True)
class _Expected:
    """A part and the shape that its tensor must have."""

    part: Part
    shape: tuple[int, ...]


class NameMap(Protocol):
    """Where logical tensors lie; see `flashrt.arch.names.TensorMap`."""

    @property
    def head(self) -> str: ...
    def parts(self, key: str) -> tuple[Part, ...]: ...
    def neurons(self, key: str, run: int) -> tuple[Part | None, Part, Part]: ...
    def is_harmless(self, tensor: str) -> bool: ...


class Checkpoint:
    """One model on disk. Memory is bounded: ranges are read on demand, at most one tensor's stored bytes are kept."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        name: str,
        source: str,
        fingerprint: str,
        reader: TensorReader,
        tensor_map: NameMap,
        text: Callable[[], TextFiles] | None,
        quantization: Any = None,
    ):
        self.spec, self.name, self.source, self.fingerprint = spec, name, source, fingerprint
        self.reader, self.names, self._text = reader, tensor_map, text
        self.quantization = quantization  # as config.json has it

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.reader.close()

    @functools.cached_property
    def text(self) -> TextFiles:
        """Tokenizer, chat template and generation defaults. A GGUF tokenizer is built here, which takes seconds."""
        if self._text is None:
            raise CheckpointError(f"{self.source} has no tokenizer of its own")
        return self._text()

    def text_files(self) -> dict[str, bytes]:
        """What a pack keeps of `text`: file name → content."""
        return {} if self._text is None else self.text.to_files()

    @functools.cached_property
    def ahead(self) -> Checkpoint | None:
        """The layer that predicts further tokens, as a checkpoint of its own in the same files.

        None where there is none, and, with a CheckpointWarning, where its tensors are not those of such a layer: no
        logit depends on it.
        """
        names = ahead_tensors(self.names) if isinstance(self.names, TensorMap) else None
        if names is None:
            return None
        own = Checkpoint(
            spec=names.spec,
            name=self.name,
            source=f"the layer that predicts further tokens of {self.source}",
            fingerprint=self.fingerprint,
            reader=self.reader,
            tensor_map=names,
            text=None,
            quantization=self.quantization,
        )
        unsupported = own.spec.unsupported()
        if problems := own.problems() or ([] if unsupported is None else [unsupported]):
            found = f"{own.source} is left out, which drafts and changes no text: {_first(problems)}"
            warnings.warn(found, CheckpointWarning, stacklevel=2)
            return None
        return own

    def problems(self) -> list[str]:
        """What is wrong with the tensors that are needed."""
        return [problem for expected in self._expected() if (problem := self._problem(expected))]

    @functools.cached_property
    def weight_bytes_source(self) -> int:
        """Bytes that the needed tensors take as stored; a tensor that several parts read counts once."""
        names = {expected.part.tensor for expected in self._expected()}
        return sum(self.reader.tensors[name].nbytes for name in names if name in self.reader.tensors)

    def vector(self, key: str) -> F32:
        """A logical vector, float32 [length]."""
        return np.concatenate([self._part_vector(part) for part in self.names.parts(key)])

    def matrix_rows(self, key: str, start: int, stop: int) -> F32:
        """Rows start:stop of a logical matrix, float32 [stop - start, columns]."""
        return self._rows(key, start, stop, self.reader.rows)

    def _rows(self, key: str, start: int, stop: int, read: ReadRows[Number]) -> NDArray[Number]:
        pieces, first, counts = [], 0, self._part_rows(key)
        for part, rows in zip(self.names.parts(key), counts, strict=True):
            begin, end = max(start - first, 0), min(stop - first, rows)
            if begin < end:
                pieces.append(self._part_matrix(part, rows, begin, end, read))
            first += rows
        if not 0 <= start < stop <= first:
            raise CheckpointError(f"rows {start}:{stop} of {key} were asked for; it has {first}")
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def neuron_rows(self, key: str, run: int, start: int, stop: int) -> tuple[F32 | None, F32, F32]:
        """(gate, up, down) of neurons start:stop of a run, each float32 [stop - start, hidden]; gate None without one.

        `down` holds columns of the down matrix, transposed.
        """
        gate, up, down = self.names.neurons(key, run)
        neurons = self._neurons_of(key)
        if not 0 <= start < stop <= neurons:
            raise CheckpointError(f"neurons {start}:{stop} of {key} were asked for; it has {neurons}")
        return (
            None if gate is None else self._part_matrix(gate, neurons, start, stop, self.reader.rows),
            self._part_matrix(up, neurons, start, stop, self.reader.rows),
            self._columns(down, start, stop),
        )

    def all_parts(self) -> Iterator[tuple[str, tuple[Part | None, ...]]]:
        """Every logical key and its parts; (gate, up, down) of run `r` of neurons '{i}.ffn' under '{i}.ffn.{r}'."""
        for layer in (None, *range(len(self.spec.layers))):
            yield from self._parts_of(layer)

    def files_behind(self, layer: int | None) -> set[Path]:
        """The files that a layer's tensors lie in, or with None those of no layer."""
        names = [part.tensor for _, parts in self._parts_of(layer) for part in parts if part is not None]
        return {path for name in names for path in self.reader.tensors[name].paths}

    def _parts_of(self, layer: int | None) -> Iterator[tuple[str, tuple[Part | None, ...]]]:
        prefix, spec = "" if layer is None else f"{layer}.", self.spec
        matrices = spec.shared_matrices() if layer is None else spec.layer_matrices(layer)
        vectors = (name for name in self._vector_lengths if name.startswith(prefix or "norm."))
        for key in (*matrices, *vectors):
            yield key, self.names.parts(key)
        if layer is not None:
            for key, (runs, _) in spec.layer_neurons(layer).items():
                for run in range(runs):
                    yield f"{key}.{run}", self.names.neurons(key, run)

    def matrix_parts(self, key: str) -> Iterator[tuple[Part, int]]:
        """The parts of a matrix, in the order of its rows, and the rows of each."""
        yield from zip(self.names.parts(key), self._part_rows(key), strict=True)

    def part_dtypes(self, key: str) -> tuple[str, ...]:
        """What the parts of a matrix are stored as; parts of which rows are columns say so: no codec is kept then."""
        stored = ((part, self.reader.tensors[part.tensor].dtype) for part in self.names.parts(key))
        return tuple(
            f"{dtype} by column" if part.transposed and dtype not in PLAIN_CODECS else dtype for part, dtype in stored
        )

    def neuron_dtypes(self, key: str) -> tuple[str, str, str]:
        """What gate, up and down are stored as: nothing ('') where there is no gate, 'A/B' where runs differ."""
        runs = self.spec.layer_neurons(_layer_of(key))[key][0]
        gate, up, down = (
            "/".join(dict.fromkeys(self.reader.tensors[part.tensor].dtype for part in parts if part is not None))
            for parts in zip(*(self.names.neurons(key, run) for run in range(runs)), strict=True)
        )
        return gate, up, down

    def stored_rows(self, key: str, start: int, stop: int) -> Raw:
        """Rows start:stop of a logical matrix of one codec as they are stored, uint8 [stop - start, bytes]."""
        return self._rows(key, start, stop, self.reader.stored_rows)

    def stored_neurons(self, key: str, run: int, start: int, stop: int) -> tuple[Raw | None, Raw]:
        """Gate and up of neurons start:stop as they are stored, uint8 [stop - start, bytes]; gate None without one."""
        gate, up, _ = self.names.neurons(key, run)
        neurons, read = self._neurons_of(key), self.reader.stored_rows
        own = None if gate is None else self._part_matrix(gate, neurons, start, stop, read)
        return own, self._part_matrix(up, neurons, start, stop, read)

    def stored_down(self, key: str, run: int, start: int, stop: int) -> Raw:
        """Down of neurons start:stop, which are whole blocks, as it is stored: uint8 [hidden, bytes]."""
        down = self.names.neurons(key, run)[2]
        return self.reader.stored_columns(down.tensor, start, stop, down.expert)

    def down_rows(self, key: str, run: int, start: int, stop: int) -> F32:
        """Down of neurons start:stop, transposed: float32 [stop - start, hidden]."""
        return self._columns(self.names.neurons(key, run)[2], start, stop)

    def validate(self) -> None:
        """Check name, shape and dtype of every needed tensor, and that no other tensor would change results.

        Raises one CheckpointError listing the first problems, or UnsupportedModelError naming the first such tensors.
        """
        if problems := self.problems():
            raise CheckpointError(f"{self.source} cannot be used: {_first(problems)}")
        read = {expected.part.tensor for expected in self._expected()}
        if self.spec.tied:
            read.add(self.names.head)  # equal to the embedding: see `sources.huggingface`
        unread = [name for name in self.reader.tensors if name not in read and not self.is_harmless(name)]
        if unread:
            raise UnsupportedModelError(
                f"{self.source} is not supported: flashrt does not use {len(unread)} of its tensors, without which "
                f"results would be wrong: {_first(unread)}"
            )

    def is_harmless(self, name: str) -> bool:
        """Whether no logit depends on a tensor that no part names; biases of zeros, as GPTQ adds them, are read."""
        if self.names.is_harmless(name):
            return True
        tensor = self.reader.tensors[name]
        is_bias = name.endswith(".bias") and len(tensor.shape) == 1 and tensor.codec is not None
        return is_bias and not self.reader.vector(name).any()

    def _problem(self, expected: _Expected) -> str | None:
        part = expected.part
        tensor = self.reader.tensors.get(part.tensor)
        if tensor is None:
            return f"tensor {part.tensor} is missing"
        if tensor.codec is None:
            return f"tensor {part.tensor} is stored as {tensor.dtype}, which is not supported"
        wanted = expected.shape
        if part.columns:
            wanted = (wanted[0] // part.columns, part.columns)
        if part.groups is not None:
            wanted = (math.prod(part.groups), *wanted[1:])
            if part.transposed:
                wanted = (wanted[0], expected.shape[0] // part.groups[0])
        if part.stacked:
            wanted = (part.stacked, wanted[0] // part.stacked, *wanted[1:])
        found = tensor.shape
        if part.columns and len(found) == 3 and found[1] == 1:  # a convolution of one channel each
            found = (found[0], found[2])
        if _without_ones(found) != _without_ones(wanted):  # one row may be stored as a vector, or the reverse
            return f"tensor {part.tensor} has shape {list(tensor.shape)}, expected {list(wanted)}"
        return None

    def _expected(self) -> Iterator[_Expected]:
        spec = self.spec
        for key in spec.vectors():
            for part, rows in zip(self.names.parts(key), self._part_rows(key), strict=True):
                yield _Expected(part, self._vector_shape(key, part, rows))
        matrices = dict(spec.shared_matrices())
        for i in range(len(spec.layers)):
            matrices |= spec.layer_matrices(i)
        for key, (_, columns) in matrices.items():
            for part, rows in zip(self.names.parts(key), self._part_rows(key), strict=True):
                yield _Expected(part, (rows, columns))
        for i in range(len(spec.layers)):
            for key, (runs, neurons) in spec.layer_neurons(i).items():
                for run in range(runs):
                    gate, up, down = self.names.neurons(key, run)
                    if gate is not None:
                        yield _Expected(gate, _stack(gate, neurons, spec.hidden, runs))
                    yield _Expected(up, _stack(up, neurons, spec.hidden, runs))
                    yield _Expected(down, _stack(down, spec.hidden, neurons, runs))

    def _vector_shape(self, key: str, part: Part, length: int) -> tuple[int, ...]:
        """Of the tensor that a part of a vector is: biases of experts lie one after the other."""
        layer, _, name = key.partition(".")
        experts = self.spec.layers[int(layer)].ffn.experts if name in ("gate.bias", "up.bias", "down.bias") else 0
        length = length if part.rows is None else 2 * length
        return (experts, length // experts) if experts else (length,)

    def _part_rows(self, key: str) -> tuple[int, ...]:
        """Rows of each part of a vector or matrix."""
        rows = self._rows_of(key)
        layer, _, name = key.partition(".")
        if name in ("qkv", "qkv.bias") and len(self.names.parts(key)) > 1:  # one part: stored as one tensor
            return tuple(own for own in self.spec.layers[int(layer)].mixer.qkv_parts if own)
        return (rows,)

    def _rows_of(self, key: str) -> int:
        if key in self._vector_lengths:
            return self._vector_lengths[key]
        shared = self.spec.shared_matrices()
        if key in shared:
            return shared[key][0]
        layer = key.partition(".")[0]
        matrices = (
            self.spec.layer_matrices(int(layer)) if layer.isdigit() and int(layer) < len(self.spec.layers) else {}
        )
        if key not in matrices:
            raise CheckpointError(f"{key} is not a tensor of this model")
        return matrices[key][0]

    def _neurons_of(self, key: str) -> int:
        """Neurons of one run."""
        return self.spec.layer_neurons(_layer_of(key))[key][1]

    @functools.cached_property
    def _vector_lengths(self) -> dict[str, int]:
        return self.spec.vectors()

    def _columns(self, part: Part, start: int, stop: int) -> F32:
        """Columns start:stop of a part, transposed."""
        read = self.reader.rows if part.transposed else self.reader.columns
        return read(part.tensor, start, stop, part.expert)

    def _part_vector(self, part: Part) -> F32:
        values = self.reader.vector(part.tensor)
        if part.rows is not None:
            values = values[part.rows[0] :: part.step]
        if part.columns:
            values = values.reshape(-1, part.columns).T.ravel()
        if part.log:
            values = -np.exp(values)
        if part.heads:
            values = _unpermute(values[:, None], part.heads, part)[:, 0]
        return values + np.float32(part.add) if part.add else values

    def _part_matrix(self, part: Part, rows: int, start: int, stop: int, read: ReadRows[Number]) -> NDArray[Number]:
        """Rows start:stop of one part that has `rows`, as `read` gives them."""
        if part.heads:
            # A permutation moves rows within their head only, so whole heads are read and cut.
            head = rows // part.heads
            first, last = start // head, -(-stop // head)
            values = read(part.tensor, first * head, last * head, part.expert)
            return _unpermute(values, last - first, part)[start - first * head : stop - first * head]
        if part.groups is not None and part.rows is not None:
            (count, each), (begin, end) = part.groups, part.rows
            own = rows // count
            first, last = start // own, -(-stop // own)
            values = read(part.tensor, first * each, last * each, part.expert).reshape(last - first, each, -1)
            values = values[:, begin:end]
            if part.transposed:
                values = values.swapaxes(1, 2)
            return values.reshape((last - first) * own, -1)[start - first * own : stop - first * own]
        shift, step = part.rows[0] if part.rows else 0, part.step
        first, last = shift + start * step, shift + (stop - 1) * step + 1
        if part.transposed:  # only numbers that are decoded are stored so
            return self.reader.columns(part.tensor, first, last, part.expert)[::step]  # type: ignore[return-value]
        return read(part.tensor, first, last, part.expert)[::step]


def _stack(part: Part, rows: int, columns: int, runs: int) -> tuple[int, ...]:
    """Shape of the tensor that holds rows of neurons, alone or with other rows, and other runs."""
    shape = rows if part.rows is None else 2 * rows, columns  # gate and up share the tensor
    shape = shape[::-1] if part.transposed else shape
    return shape if part.expert is None else (runs, *shape)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape from its first dimension on that is not 1."""
    return tuple(itertools.dropwhile(lambda length: length == 1, shape))


def _layer_of(key: str) -> int:
    return int(key.partition(".")[0])


def _first(items: list[str]) -> str:
    more = len(items) - _SHOWN
    return "; ".join(items[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _unpermute(values: NDArray[Number], heads: int, part: Part) -> NDArray[Number]:
    """The rotary rows of each of so many heads: [n / 2, 2] (pairs rotated against each other adjacent) → halves."""
    rows, columns = values.shape
    before, own, behind = np.split(values.reshape(heads, -1, columns), (part.fixed, part.fixed + part.rotary), axis=1)
    halves = own.reshape(heads, part.rotary // 2, 2, columns).swapaxes(1, 2).reshape(own.shape)
    return np.concatenate((before, halves, behind), axis=1).reshape(rows, columns)
