"""The weights of a pack as the decoder sees them: each tensor a sequence of runs of bundles, in ascending order.

Where a run comes from (pinned in memory, or streamed through the ring) is decided by the plan and invisible to the
arithmetic, which is why a result does not depend on the budget.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from flashrt.budget.planner import Plan, owner_of, prefix_bytes
from flashrt.cache.device import Device, Tensor
from flashrt.errors import PackError
from flashrt.storage.layout import PAGE, Block, PackLayout, TensorLayout
from flashrt.storage.pack import Pack
from flashrt.storage.reader import Reader
from flashrt_kernels.rows import row_bytes

Array = np.ndarray


class Weights:
    """Pinned and streamed weights of `pack` under `plan`. `load` must be called before anything else."""

    def __init__(self, pack: Pack, plan: Plan, device: Device, reader: Reader) -> None:
        self.pack, self.plan, self.device, self.reader = pack, plan, device, reader
        self.spec, self.layout = pack.spec, pack.layout
        self._pinned: dict[str, Tensor] = {}
        for tensor in self.layout.tensors.values():
            bundles = prefix_bytes(tensor, plan.pinned[tensor.name]) // tensor.stride
            owner = owner_of(self.spec, tensor)
            self._pinned[tensor.name] = device.allocate(owner, (bundles, tensor.stride), np.uint8)
        self._vectors = {
            name: device.allocate("norms and biases", (vector.length,), np.float32)
            for name, vector in self.layout.vectors.items()
        }
        has_experts = any(tensor.runs > 1 for tensor in self.layout.tensors.values())
        self._static = device.stream(plan.slots, plan.slot_bytes)
        self._experts = device.stream(plan.slots if has_experts else 0, plan.slot_bytes)
        self._blocks = {t.name: [t.block(i) for i in range(t.blocks)] for t in self.layout.tensors.values()}
        self._body = self._streamed(_body_tensors(self.layout.tensors.values()))
        self._head = self._streamed([self.layout.tensors[self.spec.head]])
        self._ahead: bool | None = None  # whether a pass is already expected, and if so, with the head or without
        self._window = device.window(window_bytes(self.layout))
        self._checked: set[tuple[str, int]] = set()

    @property
    def wait_s(self) -> float:
        """Seconds that compute has waited for reads."""
        return self._static.wait_s + self._experts.wait_s

    def load(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read vectors and pinned blocks."""
        self._load_vectors()
        done, total = 0, self.plan.pinned_bytes

        def arrived(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        self.device.fill(self._pinned_blocks(), arrived)
        self.device.keep(self._streamed(self.layout.tensors.values()))

    def vector(self, name: str) -> Tensor:
        """A norm weight or bias, float32 [length]."""
        return self._vectors[name]

    def begin_pass(self, head: bool, next_head: bool) -> None:
        """Start a pass over all layers, with the head or without; `next_head` guesses the pass after it."""
        if self._ahead is not None and self._ahead != head:
            self._static.flush()
            self._ahead = None
        if self._ahead is None:
            self._static.flush()
            self._expect_pass(head)
        self._expect_pass(next_head)
        self._ahead = next_head

    def abandon_pass(self) -> None:
        """Forget what was read ahead, after a pass that was left half-way."""
        self._ahead = None
        self._static.flush()
        self._experts.flush()

    def expect_experts(self, layer: int, experts: Sequence[int]) -> None:
        """Start reading the experts that the router of `layer` chose, in ascending order."""
        tensor = self.layout.tensors[f"{layer}.ffn"]
        pinned = self.plan.pinned[tensor.name]
        for expert in experts:
            indices = tensor.run_block_range(expert)
            self._experts.expect(self._blocks[tensor.name][max(indices.start, pinned) : max(indices.stop, pinned)])

    def runs(self, name: str, run: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Pairs (first bundle within the run, uint8 [bundles, stride]) that together cover one run of a tensor."""
        tensor = self.layout.tensors[name]
        start, pinned = run * tensor.run_stride, self._pinned[name]
        resident = min(max(len(pinned) - start, 0), tensor.run_bundles)
        step = max(resident, 1) if self.device.merges else tensor.block_bundles
        for first in range(0, resident, step):
            yield first, pinned[start + first : start + min(first + step, resident)]
        streamer = self._experts if tensor.runs > 1 else self._static
        indices = tensor.run_block_range(run)
        for index in range(max(indices.start, self.plan.pinned[name]), indices.stop):
            block = self._blocks[name][index]
            first = block.first - start
            bundles = streamer.take(block).reshape(block.bundles, tensor.stride)
            yield first, bundles[: tensor.run_bundles - first]
        streamer.release()

    def rows(self, name: str, ids: Iterable[int], out: Tensor) -> None:
        """Copy the encoded rows `ids` of a matrix into `out` (uint8 [len(ids), row_bytes])."""
        tensor = self.layout.tensors[name]
        size = row_bytes(tensor.codec, tensor.columns)
        pinned = self._pinned[name]
        for i, row in enumerate(ids):
            bundle, position = divmod(row, tensor.bundle_rows)
            if bundle < len(pinned):
                out[i] = pinned[bundle, position * size : (position + 1) * size]
            else:
                self.device.put(self._read_row(tensor, bundle, position * size, size), out[i])

    def _read_row(self, tensor: TensorLayout, bundle: int, offset: int, size: int) -> Array:
        self._check_block(self._blocks[tensor.name][bundle // tensor.block_bundles])
        return self.reader.read_rows(tensor.file, tensor.offset + bundle * tensor.stride + offset, size, self._window)

    def _check_block(self, block: Block) -> None:
        """Read a block whole the first time that one of its rows is wanted, so that its checksum is compared."""
        key = (block.tensor, block.index)
        if key not in self._checked:
            self.reader.submit(block, self._window[: block.nbytes]).wait()
            self._checked.add(key)

    def _pinned_blocks(self) -> Iterator[tuple[Block, Tensor]]:
        for name, memory in self._pinned.items():
            stride = self.layout.tensors[name].stride
            flat = memory.reshape(-1)
            for block in self._blocks[name][: self.plan.pinned[name]]:
                start = block.first * stride
                yield block, flat[start : start + block.nbytes]

    def _load_vectors(self) -> None:
        for file in self.layout.file_bytes:
            crc = 0
            with open(self.pack.path / file, "rb") as handle:
                for layout in self.layout.vectors_of(file):
                    handle.seek(layout.offset)
                    data = handle.read(4 * layout.length)
                    crc = zlib.crc32(data, crc)
                    if len(data) == 4 * layout.length:
                        self.device.put(np.frombuffer(data, "<f4"), self._vectors[layout.name])
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if crc != self.pack.manifest.files[file].vectors_crc32:
                raise PackError(f"{self.pack.path / file} is damaged: its vectors do not match their checksum")

    def _expect_pass(self, head: bool) -> None:
        self._static.expect(self._body)
        if head:
            self._static.expect(self._head)

    def _streamed(self, tensors: Iterable[TensorLayout]) -> list[Block]:
        return [block for t in tensors for block in self._blocks[t.name][self.plan.pinned[t.name] :]]


def _body_tensors(tensors: Iterable[TensorLayout]) -> Iterator[TensorLayout]:
    """Tensors that every pass walks through in the same order: all of the layers' but the experts."""
    for tensor in tensors:
        if tensor.name[0].isdigit() and tensor.runs == 1:
            yield tensor


def window_bytes(layout: PackLayout) -> int:
    """Bytes of the window through which single rows are read: any block, at any offset."""
    return max(t.max_block_bytes for t in layout.tensors.values()) + 2 * PAGE
