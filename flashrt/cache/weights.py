"""The weights of a pack as the decoder sees them: each tensor a sequence of runs of bundles, in ascending order.

Whether a run is pinned in memory or streamed through the ring is decided by the plan and invisible to the arithmetic,
which is why a result does not depend on the budget. Memory that a kind of FFN uses otherwise, behind the pinned bundles
of a tensor or on its own, is that kind's (`flashrt.model.ffn`).
"""

from __future__ import annotations

import itertools
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from flashrt.budget.owners import VECTOR_STEP, owner_of, prefix_bytes, vector_bytes
from flashrt.budget.plan import Plan
from flashrt.cache.device import Device, Progress, Tensor
from flashrt.cache.from_file import FromFile
from flashrt.cache.loading import Filler, Loading
from flashrt.cache.verification import Verifier
from flashrt.errors import DiskError, PackError
from flashrt.storage.layout import Block, PackLayout, TensorLayout
from flashrt.storage.pack import Pack
from flashrt.storage.reader import Reader
from flashrt_kernels.rows import align, row_bytes


class Weights:
    """Pinned and streamed weights of `pack` under `plan`. `load` must be called before anything else.

    `ring` brings what streams, in the order in which a pass takes it.
    """

    def __init__(self, pack: Pack, plan: Plan, device: Device, reader: Reader) -> None:
        self.pack, self.plan, self.device, self.reader = pack, plan, device, reader
        self.spec, self.layout = pack.spec, pack.layout
        self._memory: dict[str, Tensor] = {}
        self._pinned: dict[str, Tensor] = {}
        for tensor in self.layout.tensors.values():
            bundles = prefix_bytes(tensor, plan.pinned[tensor.name]) // tensor.stride
            shape = bundles + plan.slots(tensor.name), tensor.stride
            memory = device.allocate(owner_of(self.spec, tensor), shape, np.uint8)
            self._memory[tensor.name], self._pinned[tensor.name] = memory, memory[:bundles]
        self._whole = {  # tensors that are in memory in one run, as nearly all are that do not stream
            name: pinned[: tensor.run_bundles]
            for name, tensor in self.layout.tensors.items()
            if tensor.runs == 1 and len(pinned := self._pinned[name]) >= tensor.run_bundles and device.split_invariant
        }
        self._vectors = _slices(device, self.layout)
        self.ring = device.stream(plan.ring_slots, plan.slot_bytes)
        self._window = device.window(window_bytes(self.layout))
        self.verifier = Verifier(reader, self._window)
        self._row_wait_s = 0.0
        self._loading: Loading | None = None  # until all that is pinned is known to be there

    @property
    def wait_s(self) -> float:
        """Seconds that compute has waited for reads."""
        return self.ring.wait_s + self._row_wait_s

    def load(self, arrived: Progress) -> None:
        """Read vectors, and begin to read pinned blocks in the order of a pass; what asks for a tensor waits for it."""
        self._load_vectors()
        names = sorted(self._pinned, key=lambda name: name == "head")  # which comes last
        counts = itertools.accumulate(self.plan.pinned[name] for name in names)
        items = itertools.chain.from_iterable(map(self._pinned_blocks, names))
        self._loading = Loading(self._filler(), items, dict(zip(names, counts, strict=True)), arrived)

    def _filler(self) -> Filler:
        """Who brings pinned blocks."""
        return FromFile(self.device, self.reader) if self.pack.sources else self.device

    def finish_loading(self) -> None:
        """Return when all pinned blocks are in memory. Raises DiskError and PackError."""
        if self._loading is not None:
            self._loading.finish()
            self._loading = None

    def stop_loading(self) -> None:
        """Give up what has not arrived."""
        if self._loading is not None:
            self._loading.stop()

    def vector(self, name: str) -> Tensor:
        """A norm weight or bias, float32 [length]."""
        return self._vectors[name]

    def resident(self, name: str) -> bool:
        """Whether all of a matrix is in memory."""
        return all(self.plan.pinned[part.name] == part.blocks for part in self.layout.parts(name))

    def pinned(self, name: str) -> Tensor:
        """The leading bundles of a tensor that are pinned, uint8 [bundles, stride]."""
        self._await(name)
        return self._pinned[name]

    def memory(self, name: str) -> Tensor:
        """The pinned bundles of a tensor and the slots behind them, uint8 [bundles + slots, stride]."""
        self._await(name)
        return self._memory[name]

    def runs(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Pairs (first bundle, uint8 [bundles, stride]) that together cover a tensor of one run."""
        if name in self._whole:
            self._await(name)
            yield 0, self._whole[name]
            return
        tensor = self.layout.tensors[name]
        yield from self.pinned_of(tensor)
        for block in self.unpinned(tensor):
            bundles = self.ring.take(block).reshape(block.bundles, tensor.stride)
            yield block.first, bundles[: tensor.run_bundles - block.first]
        self.ring.release()

    def pinned_of(self, tensor: TensorLayout, run: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Of one run, the pairs (first bundle within it, uint8 [bundles, stride]) that are pinned."""
        start, pinned = run * tensor.run_stride, self.pinned(tensor.name)
        resident = min(max(len(pinned) - start, 0), tensor.run_bundles)
        step = max(resident, 1) if self.device.split_invariant else tensor.block_bundles
        for first in range(0, resident, step):
            yield first, pinned[start + first : start + min(first + step, resident)]

    def unpinned(self, tensor: TensorLayout, run: int = 0) -> Iterator[Block]:
        """The blocks of one run that the plan does not pin."""
        indices = tensor.run_block_range(run)
        yield from map(tensor.block, range(max(indices.start, self.plan.pinned[tensor.name]), indices.stop))

    def streamed(self, names: Iterable[str]) -> Iterator[Block]:
        """The blocks of some tensors, in all their runs, that the plan does not pin."""
        for name in names:
            tensor = self.layout.tensors[name]
            yield from map(tensor.block, range(self.plan.pinned[name], tensor.blocks))

    def rows(self, name: str, ids: Iterable[int], out: Tensor) -> None:
        """Copy the encoded rows `ids` of a matrix into `out` (uint8 [len(ids), row_bytes])."""
        tensor = self.layout.tensors[name]
        size = row_bytes(tensor.codec, tensor.columns)
        pinned = self.pinned(name)
        missing = []
        for i, row in enumerate(ids):
            bundle, position = divmod(row, tensor.bundle_rows)
            if bundle < len(pinned):
                out[i] = pinned[bundle, position * size : (position + 1) * size]
            else:
                missing.append((i, bundle, position * size))
        if missing:
            began = time.perf_counter()
            self._read_rows(tensor, size, missing, out)
            self._row_wait_s += time.perf_counter() - began

    def _read_rows(self, tensor: TensorLayout, size: int, rows: Sequence[tuple[int, int, int]], out: Tensor) -> None:
        """Read rows (position in `out`, bundle, offset within it) of `size` bytes, a windowful at a time."""
        if tensor.source is None:
            self.verifier.check(tensor, {bundle // tensor.block_bundles for _, bundle, _ in rows})
        step = len(self._window) // size
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            offsets = np.array([tensor.offset + bundle * tensor.stride + offset for _, bundle, offset in part])
            landed = self._window[: len(part) * size].reshape(len(part), size)
            self.reader.submit_rows(tensor.file, offsets, landed, np.arange(len(part))).wait()
            if tensor.source is not None:  # which has no checksums
                self.reader.check_rows(tensor.name, landed)
            for (i, _, _), row in zip(part, landed, strict=True):
                self.device.put(row, out[i])

    def _await(self, name: str) -> None:
        if self._loading is not None:
            began = time.perf_counter()
            self._loading.wait(name)
            self._row_wait_s += time.perf_counter() - began

    def _pinned_blocks(self, name: str) -> Iterator[tuple[Block, Tensor]]:
        stride, flat = self.layout.tensors[name].stride, self._pinned[name].reshape(-1)
        for block in map(self.layout.tensors[name].block, range(self.plan.pinned[name])):
            start = block.first * stride
            yield block, flat[start : start + block.nbytes]

    def _load_vectors(self) -> None:
        for file in self.layout.file_bytes:
            path = self.pack.path / file
            try:
                crc = self._load_vectors_of(path)
            except OSError as error:
                raise DiskError(f"reading {path} failed: {error.strerror}") from None
            if crc != self.pack.manifest.files[file].vectors_crc32:
                raise PackError(
                    f"{path} is damaged: its vectors do not match their checksum. Pack the checkpoint again"
                )

    def _load_vectors_of(self, path: Path) -> int:
        """Read a file's vectors; the CRC-32 of them all."""
        crc = 0
        with open(path, "rb") as handle:
            for layout in self.layout.vectors_of(path.name):
                handle.seek(layout.offset)
                data = handle.read(4 * layout.length)
                crc = zlib.crc32(data, crc)
                if len(data) == 4 * layout.length:
                    self.device.put(np.frombuffer(data, "<f4"), self._vectors[layout.name])
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return crc


def _slices(device: Device, layout: PackLayout) -> dict[str, Tensor]:
    """Memory for every vector, cut from one allocation."""
    memory = device.allocate("norms and biases", (vector_bytes(layout) // 4,), np.float32)
    vectors, start = {}, 0
    for name, vector in layout.vectors.items():
        vectors[name] = memory[start : start + vector.length]
        start += align(vector.length, VECTOR_STEP)
    return vectors


def window_bytes(layout: PackLayout) -> int:
    """Bytes of the window into which single rows are read: any block, or many rows."""
    return max(t.max_block_bytes for t in layout.tensors.values())
