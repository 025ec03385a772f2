"""The weights of a pack as the decoder sees them: each tensor a sequence of runs of bundles, in ascending order.

Where a run comes from (pinned in memory, streamed through the ring, or out of the cache of experts) is decided by the
plan and invisible to the arithmetic, which is why a result does not depend on the budget.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flashrt.budget.claims.adaptive import BLOCKS_PER_CALL, longest
from flashrt.budget.planner import VECTOR_STEP, Plan, owner_of, prefix_bytes, vector_bytes
from flashrt.cache.adaptive import AdaptiveNeurons, NeuronRun
from flashrt.cache.device import Device, Tensor
from flashrt.cache.experts import ExpertCache, Key
from flashrt.cache.rows import RowCache
from flashrt.cache.streamer import Place, Streamer
from flashrt.cache.verification import Verifier
from flashrt.errors import DiskError, PackError
from flashrt.storage.layout import Block, PackLayout, TensorLayout
from flashrt.storage.pack import Pack
from flashrt.storage.reader import Reader, Ticket
from flashrt_kernels.rows import align, row_bytes

Array = np.ndarray


@dataclass(frozen=True, slots=True)
class PassKind:
    """A pass over the weights: with the head or without, of many tokens (`wide`) or few.

    One of few tokens reads the rows that it needs, where the plan says so, instead of whole blocks of neurons.
    """

    head: bool
    wide: bool


class Weights:
    """Pinned and streamed weights of `pack` under `plan`. `load` must be called before anything else."""

    def __init__(self, pack: Pack, plan: Plan, device: Device, reader: Reader) -> None:
        self.pack, self.plan, self.device, self.reader = pack, plan, device, reader
        self.spec, self.layout = pack.spec, pack.layout
        self._memory: dict[str, Tensor] = {}
        self._pinned: dict[str, Tensor] = {}
        for tensor in self.layout.tensors.values():
            bundles = prefix_bytes(tensor, plan.pinned[tensor.name]) // tensor.stride
            slots = bundles + plan.windows.get(tensor.name, 0)
            memory = device.allocate(owner_of(self.spec, tensor), (slots, tensor.stride), np.uint8)
            self._memory[tensor.name], self._pinned[tensor.name] = memory, memory[:bundles]
        self._whole = {  # tensors that are in memory in one run, as nearly all are that do not stream
            name: pinned[: tensor.run_bundles]
            for name, tensor in self.layout.tensors.items()
            if tensor.runs == 1 and len(pinned := self._pinned[name]) >= tensor.run_bundles and device.split_invariant
        }
        self._vectors = _slices(device, self.layout)
        has_experts = any(tensor.runs > 1 for tensor in self.layout.tensors.values())
        span = max(min(BLOCKS_PER_CALL, plan.ring_slots // 3), 1)
        self.resident = {
            name: AdaptiveNeurons(self.layout.tensors[name], self._memory[name], span) for name in plan.adaptive_ffns
        }
        self._usage = device.allocate(
            "speculation", (longest(self.layout.tensors[name] for name in plan.adaptive_ffns),), np.float32
        )
        self._static = device.stream(plan.ring_slots, plan.slot_bytes)
        if self.resident:
            self._ring.submit = self._submit
        self._experts = device.stream(plan.ring_slots if has_experts else 0, plan.slot_bytes)
        self.experts = self._expert_cache() if plan.expert_slots else None
        self._ahead: PassKind | None = None  # the pass that is already expected
        self._window = device.window(window_bytes(self.layout))
        self._verifier = Verifier(reader, self._window)
        self._row_wait_s = 0.0

    @property
    def wait_s(self) -> float:
        """Seconds that compute has waited for reads."""
        cached = self.experts.wait_s if self.experts else 0.0
        return self._static.wait_s + self._experts.wait_s + cached + self._row_wait_s

    def load(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Read vectors and pinned blocks."""
        self._load_vectors()
        done, total = 0, self.plan.pinned_bytes

        def arrived(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            progress(done, total)

        self.device.fill(self._pinned_blocks(), arrived)
        if self.experts:
            self.experts.fill(self._all_experts(), arrived)
        self.device.cache_on_host(self._streamed(self.layout.tensors.values()))

    def vector(self, name: str) -> Tensor:
        """A norm weight or bias, float32 [length]."""
        return self._vectors[name]

    def begin_pass(self, kind: PassKind, next_pass: PassKind) -> None:
        """Start a pass over all layers; `next_pass` guesses the one after it."""
        if not (self.plan.windows or self.resident):  # then passes of few tokens read what others do
            kind, next_pass = replace(kind, wide=True), replace(next_pass, wide=True)
        if self._ahead != kind:
            self._flush()
            self._expect_pass(kind)
        self._expect_pass(next_pass)
        self._ahead = next_pass

    def abandon_pass(self) -> None:
        """Forget what was read ahead, after a pass that was left half-way."""
        self._ahead = None
        with contextlib.ExitStack() as all_of_them:  # even if one is interrupted
            if self.experts:
                all_of_them.callback(self.experts.abandon)
            all_of_them.callback(self._experts.flush)
            all_of_them.callback(self._flush)

    def expect_experts(self, layer: int, chosen: Array) -> None:
        """Start reading the experts that the router of `layer` chose (int [T, k]), in ascending order."""
        tensor = self.layout.tensors[f"{layer}.ffn"]
        if tensor.runs == 1:  # a mixture of one expert streams like a dense block
            return
        if self.experts:
            self.experts.expect(layer, chosen)
        else:
            experts = np.unique(chosen).tolist()
            self._experts.expect(block for expert in experts for block in self._unpinned(tensor, expert))

    def prefetch_experts(self, layer: int, chosen: Array) -> None:
        """Read ahead what the router of `layer` will probably choose (int [T, k], each token's first choice first)."""
        if self.experts and self.layout.tensors[f"{layer}.ffn"].runs > 1:
            self.experts.prefetch(layer, dict.fromkeys(chosen.T.ravel().tolist()))

    def runs(self, name: str, run: int = 0) -> Iterator[tuple[int, Tensor]]:
        """Pairs (first bundle within the run, uint8 [bundles, stride]) that together cover one run of a tensor."""
        if name in self._whole:
            yield 0, self._whole[name]
            return
        tensor = self.layout.tensors[name]
        start, pinned = run * tensor.run_stride, self._pinned[name]
        resident = min(max(len(pinned) - start, 0), tensor.run_bundles)
        step = max(resident, 1) if self.device.split_invariant else tensor.block_bundles
        for first in range(0, resident, step):
            yield first, pinned[start + first : start + min(first + step, resident)]
        if self.experts and tensor.runs > 1:
            yield from self._cached(tensor, run)
            return
        streamer = self._experts if tensor.runs > 1 else self._static
        for block in self._unpinned(tensor, run):
            first = block.first - start
            bundles = streamer.take(block).reshape(block.bundles, tensor.stride)
            yield first, bundles[: tensor.run_bundles - first]
        streamer.release()

    def spans(self, name: str, tokens: int) -> Iterator[tuple[NeuronRun, Array]]:
        """The neurons of a tensor in `resident`, in order, for a pass of few tokens.

        With each span comes where the kernel puts of what use its neurons are, float32, by which residents change.
        """
        rows = self.resident[name]
        usage = self._usage[: rows.neurons]
        usage[:] = 0
        rows.choose([block for blocks in rows.spans(wide=False) for block in blocks], rows.moves)
        for blocks in rows.spans(wide=False):
            self._static.release()
            lacking = rows.lacking(blocks)
            taken = self._ring.take_all(lacking)
            buffers = {block.index: buffer for block, buffer in zip(lacking, taken, strict=True)}
            span = rows.gather(blocks, buffers)
            yield span, usage[span.first : span.first + len(span.slots)]
            rows.exchange(blocks, buffers)
        self._static.release()
        rows.learn(0, usage, tokens)

    def blocks(self, name: str, tokens: int) -> Iterator[tuple[int, Tensor, Array]]:
        """`spans` for a pass of many tokens, as first neuron, uint8 [neurons, stride] in order, and use.

        Such a pass learns block by block, so that after the prompt those neurons are resident that it used.
        """
        rows = self.resident[name]
        for (block,) in rows.spans(wide=True):
            self._static.release()
            buffers = {}
            if rows.in_order(block):
                bundles = rows.direct(block)
            else:
                buffers[block.index] = self._static.take(block)
                bundles = rows.assemble(block, buffers[block.index])
            if len(bundles):
                usage = self._usage[: len(bundles)]
                usage[:] = 0
                yield block.first, bundles, usage
                rows.learn(block.first, usage, tokens)
                rows.choose([block])
            rows.exchange([block], buffers)
        self._static.release()

    def row_cache(self, name: str) -> RowCache | None:
        """A cache of the rows of `name` in the slots that the plan gives it; None where all are pinned."""
        if name not in self.plan.windows:
            return None
        memory, pinned = self._memory[name], len(self._pinned[name])
        return RowCache(self.reader, self._verifier, self.layout.tensors[name], memory, pinned)

    def whole(self, name: str) -> Tensor:
        """All bundles of a tensor that is pinned whole, uint8 [bundles, stride]."""
        return self._pinned[name]

    def rows(self, name: str, ids: Iterable[int], out: Tensor) -> None:
        """Copy the encoded rows `ids` of a matrix into `out` (uint8 [len(ids), row_bytes])."""
        tensor = self.layout.tensors[name]
        size = row_bytes(tensor.codec, tensor.columns)
        pinned = self._pinned[name]
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

    def _expert_cache(self) -> ExpertCache:
        memory = self.device.allocate("experts", (self.plan.expert_slots, self.plan.expert_slot_bytes), np.uint8)
        ffns = [layer.ffn for layer in self.spec.layers]
        shape = len(ffns), max(ffn.experts for ffn in ffns)
        return ExpertCache(self.device, memory, self._expert_blocks, shape)

    def _expert_blocks(self, layer: int, expert: int) -> tuple[Block, ...]:
        return tuple(self._unpinned(self.layout.tensors[f"{layer}.ffn"], expert))

    def _all_experts(self) -> Iterator[Key]:
        """The first expert of every layer, then the second: the same number of every layer begins in the cache."""
        mixtures = [(i, layer.ffn.experts) for i, layer in enumerate(self.spec.layers)]
        for expert in range(max(experts for _, experts in mixtures)):
            yield from ((i, expert) for i, experts in mixtures if expert < experts > 1)

    def _cached(self, tensor: TensorLayout, run: int) -> Iterator[tuple[int, Tensor]]:
        """The unpinned part of one expert, from the cache."""
        assert self.experts is not None
        for blocks, memory in self.experts.take(int(tensor.name.partition(".")[0]), run):
            first = blocks[0].first - run * tensor.run_stride
            bundles = memory.reshape(-1, tensor.stride)[: tensor.run_bundles - first]
            step = len(bundles) if self.device.split_invariant else tensor.block_bundles
            for begin in range(0, len(bundles), step):
                yield first + begin, bundles[begin : begin + step]

    def _read_rows(self, tensor: TensorLayout, size: int, rows: Sequence[tuple[int, int, int]], out: Tensor) -> None:
        """Read rows (position in `out`, bundle, offset within it) of `size` bytes, a windowful at a time."""
        self._verifier.check(tensor, {bundle // tensor.block_bundles for _, bundle, _ in rows})
        step = len(self._window) // size
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            offsets = np.array([tensor.offset + bundle * tensor.stride + offset for _, bundle, offset in part])
            landed = self._window[: len(part) * size].reshape(len(part), size)
            self.reader.submit_rows(tensor.file, offsets, landed, np.arange(len(part))).wait()
            for (i, _, _), row in zip(part, landed, strict=True):
                self.device.put(row, out[i])

    def _pinned_blocks(self) -> Iterator[tuple[Block, Tensor]]:
        for name, memory in self._pinned.items():
            stride = self.layout.tensors[name].stride
            flat = memory.reshape(-1)
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

    @property
    def _ring(self) -> Streamer:
        assert isinstance(self._static, Streamer), "only the CPU's kernels gather neurons"
        return self._static

    def _submit(self, places: Sequence[Place]) -> Iterator[Ticket]:
        for tensor, own in itertools.groupby(places, key=lambda place: place[0].tensor):
            rows, memory = self.resident.get(tensor), self._ring.memory
            if rows is not None:
                yield from rows.submit(self.reader, list(own), memory)
            else:
                yield from (self.reader.submit(block, memory[buffer, : block.nbytes]) for block, buffer in own)

    def _flush(self) -> None:
        self._static.flush()
        for rows in self.resident.values():
            rows.forget_reads()

    def _expect_pass(self, kind: PassKind) -> None:
        tensors = _body_tensors(self.layout.tensors.values())
        self._static.expect(self._of_pass((t for t in tensors if kind.wide or t.name not in self.plan.windows), kind))
        if kind.head:
            self._static.expect(self._streamed([self.layout.tensors[self.spec.head]]))

    def _of_pass(self, tensors: Iterable[TensorLayout], kind: PassKind) -> Iterator[Block]:
        """The blocks of tensors that a pass takes from the ring, in order."""
        for tensor in tensors:
            rows = self.resident.get(tensor.name)
            yield from self._streamed([tensor]) if rows is None else rows.blocks(kind.wide)

    def _streamed(self, tensors: Iterable[TensorLayout]) -> Iterator[Block]:
        for tensor in tensors:
            yield from map(tensor.block, range(self.plan.pinned[tensor.name], tensor.blocks))

    def _unpinned(self, tensor: TensorLayout, run: int) -> Iterator[Block]:
        """The blocks of one run that the plan does not pin."""
        indices = tensor.run_block_range(run)
        yield from map(tensor.block, range(max(indices.start, self.plan.pinned[tensor.name]), indices.stop))


def _body_tensors(tensors: Iterable[TensorLayout]) -> Iterator[TensorLayout]:
    """Tensors that every pass walks through in the same order: all of the layers' but the experts."""
    for tensor in tensors:
        if tensor.name[0].isdigit() and tensor.runs == 1:
            yield tensor


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
