"""Dense feed-forward blocks whose resident neurons are those that the text uses (`flashrt.cache.adaptive`).

A pass computes all neurons, gathered from memory and from the buffers of the ring in their order, so that not a bit of
a result depends on which are resident. A draft is computed with resident ones alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from flashrt.budget.claims.adaptive import BLOCKS_PER_CALL, AdaptiveTier, longest
from flashrt.cache.adaptive import AdaptiveNeurons
from flashrt.model.ffn.base import FfnKind, Tokens
from flashrt.model.ffn.dense import DenseBlock
from flashrt.model.workspace import Tensor, Workspace
from flashrt.storage.layout import Block
from flashrt_kernels.ffn import FfnWeights

DRAFT_SHARE = 0.5  # of a block's neurons that a draft computes with, if so many are resident


class AdaptiveBlock(DenseBlock):
    """A block and its neurons, `adaptive`. `usage` (float32 [neurons]) is where kernels say of what use each was."""

    partial = True
    mixes = False

    def __init__(self, work: Workspace, i: int, usage: Tensor) -> None:
        super().__init__(work, i)
        span = max(min(BLOCKS_PER_CALL, work.weights.plan.ring_slots // 3), 1)
        self.adaptive = AdaptiveNeurons(self.tensor, work.weights.memory(self.tensor.name), span)
        self._usage = usage[: self.adaptive.neurons]
        self.submit = self.adaptive.submit

    def expect(self, wide: bool) -> Iterable[Block]:
        return self.adaptive.blocks(wide)

    def prefill(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        """Learns block by block, so that after the prompt those neurons are resident that it used."""
        neurons, ring = self.adaptive, self.weights.ring
        for (block,) in neurons.spans(wide=True):
            ring.release()
            ordered = neurons.in_order(block)
            buffers = {} if ordered else {block.index: ring.take(block)}
            bundles = neurons.direct(block) if ordered else neurons.assemble(block, buffers[block.index])
            if len(bundles):
                usage = self._usage[: len(bundles)]
                usage[:] = 0
                self.wide(x, y, block.first, bundles, usage=usage)
                neurons.learn(block.first, usage, len(x))
                neurons.choose([block])
            neurons.exchange([block], buffers)
        ring.release()

    def decode(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        neurons, ring, usage = self.adaptive, self.weights.ring, self._usage
        usage[:] = 0
        neurons.choose_all()
        for blocks in neurons.spans(wide=False):
            ring.release()
            lacking = neurons.lacking(blocks)
            buffers = {b.index: buffer for b, buffer in zip(lacking, ring.take_all(lacking), strict=True)}
            run = neurons.gather(blocks, buffers)
            own = slice(run.first, run.first + len(run.slots))
            held = FfnWeights(neurons.memory, *self.form, *self.biases_of(own))
            streamed = run.streamed_bundles
            self.work.ops.glu(x, held, y, slots=run.slots, streamed_bundles=streamed, usage=usage[own])
            neurons.exchange(blocks, buffers)
        ring.release()
        neurons.learn(0, usage, len(x))

    def draft(self, x: Tensor, y: Tensor) -> None:
        slots = self.adaptive.drafted(DRAFT_SHARE)
        biases = self.biases_of(self.adaptive.neurons_in(slots))
        self.work.ops.glu(x, FfnWeights(self.adaptive.memory, *self.form, *biases), y, slots=slots)


class AdaptiveKind(FfnKind):
    """The blocks that the plan lets adapt."""

    @classmethod
    def computes(cls, work: Workspace, i: int) -> bool:
        return f"{i}.ffn" in work.weights.plan.tier(AdaptiveTier).ffns

    def __init__(self, work: Workspace, layers: Sequence[int]) -> None:
        most = longest(work.layout.tensors[f"{i}.ffn"] for i in layers)
        usage = work.device.allocate("speculation", (most,), np.float32)
        self.blocks: dict[int, AdaptiveBlock] = {i: AdaptiveBlock(work, i, usage) for i in layers}

    def cancel(self) -> None:
        for block in self.blocks.values():
            block.adaptive.forget_reads()
