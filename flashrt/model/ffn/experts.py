"""Mixtures of experts: a router names the neurons that a token needs, and each expert named runs once per pass.

Experts come from slots that the budget has for them, or stream (`flashrt.cache.experts`).
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from flashrt.budget.claims.experts import ExpertTier
from flashrt.cache.device import Progress
from flashrt.cache.experts import ExpertCache, ExpertStream, Key
from flashrt.cache.weights import Weights
from flashrt.model.ffn.base import FfnBlock, FfnKind, Take, Tokens
from flashrt.model.ffn.neurons import neurons_of
from flashrt.model.ffn.router import route
from flashrt.model.ffn.shared import SharedExpert
from flashrt.model.workspace import Tensor, Workspace
from flashrt.storage.layout import Block, TensorLayout
from flashrt_kernels.ffn import RoutedTokens
from flashrt_kernels.limits import NARROW_TOKENS

Array = np.ndarray


class MixtureBlock(FfnBlock):
    """The experts of one layer, which come from `store`; `after` is the next mixture."""

    def __init__(self, work: Workspace, i: int, store: ExpertCache | ExpertStream, after: MixtureBlock | None) -> None:
        super().__init__(work, i)
        self._store, self._after = store, after
        self._neurons = neurons_of(work, i, "ffn")
        self._alone = self._neurons.runs == 1  # a mixture of one expert streams like a dense block
        self._shared = SharedExpert(work, i) if self.ffn.shared else None
        self._router_bias = f"{i}.router.bias" if self.ffn.router_bias else None
        self._correction = self._of_experts("correction") if self.ffn.router_correction else None
        self._scales = self._of_experts("scales") if self.ffn.expert_scales else None

    @property
    def tensors(self) -> Sequence[str]:
        shared = () if self._shared is None else self._shared.tensors
        return (f"{self.i}.router", *shared, *(self._neurons.tensors if self._alone else []))

    def prefill(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        self._add(x, y, tokens, wide=True)

    def decode(self, x: Tensor, y: Tensor, tokens: Tokens) -> None:
        self._add(x, y, tokens, wide=False)

    def _add(self, x: Tensor, y: Tensor, tokens: Tokens, wide: bool) -> None:
        with self._branch(y) as out:
            for expert, given, routed in self._routed(x, y, tokens, wide):
                self._neurons.add(given, out, wide, routed, expert, None if self._alone else self._parts(expert))

    @property
    def output_bias(self) -> Tensor | None:
        return None  # each expert has its own

    def _of_experts(self, name: str) -> Array:
        """Numbers that the router has for each expert."""
        return np.asarray(self.work.device.get(self.weights.vector(f"{self.i}.router.{name}")))

    @contextlib.contextmanager
    def _branch(self, y: Tensor) -> Iterator[Tensor]:
        """What experts are added to: y, or what then is normed and added to it."""
        if not self.ffn.branch_norms:
            yield y
            return
        out = self.work.view("branch", len(y), self.work.spec.hidden)
        out[:] = 0
        yield out
        self.work.norm(f"{self.i}.norm.experts_post", out, out)
        y += out

    def route(self, x: Tensor, residual: Tensor, wide: bool) -> tuple[Array, Array]:
        """Experts int64 [T, k] for the normed input, or the stream before it, and their weights float32 [T, k]."""
        if self.ffn.router_norm:
            x = self.work.view("ahead", len(residual), self.work.spec.hidden)
            self.work.norm(f"{self.i}.norm.router", residual, x)
        logits = self.work.view("router", len(x), self.ffn.experts)
        self.work.linear(f"{self.i}.router", x, logits, wide, self._router_bias)
        if self.ffn.router_logit_scale != 1.0:
            logits *= self.ffn.router_logit_scale
        return route(self.work.device.get(logits), self.ffn, self._correction, self._scales)

    def _routed(self, x: Tensor, y: Tensor, tokens: Tokens, wide: bool) -> Iterator[tuple[int, Tensor, RoutedTokens]]:
        """The experts that any token chose, in ascending order, what they are given, and the tokens of each.

        What all tokens share is added to y while these are read.
        """
        chosen, weights = self.route(x, tokens.residual, wide)
        if not self._alone:
            self._store.expect(self.i, chosen)
        if self._store.looks_ahead and self._after is not None:
            self._after.look_ahead(tokens.residual, wide)
        if self._shared is not None:
            self._shared.add(x, y, wide)
        make = self.work.device.make
        ahead = self.work.view("ahead", len(x), self.work.spec.hidden)  # the next layer has looked ahead by now
        if self.ffn.branch_norms:
            self.work.norm(f"{self.i}.norm.shared_post", y, y)
            self.work.norm(f"{self.i}.norm.experts", tokens.residual, ahead)
            x = ahead
        if self.ffn.router_input:
            ahead[:] = x
            ahead *= make(weights)
            x, weights = ahead, np.ones_like(weights)
        for expert in np.unique(chosen).tolist():
            who, rank = np.nonzero(chosen == expert)
            routed = RoutedTokens(make(who.astype(np.int32)), make(weights[who, rank]))
            yield expert, x, routed
            if self.down_bias is not None:
                self._add_bias(routed, self.down_bias.reshape(self.ffn.experts, -1)[expert], y)

    def _add_bias(self, routed: RoutedTokens, bias: Tensor, y: Tensor) -> None:
        """Add an expert's down bias to its tokens, a few at a time: what that takes is not planned."""
        for begin in range(0, len(routed.tokens), NARROW_TOKENS):
            part = slice(begin, begin + NARROW_TOKENS)
            y[routed.tokens[part]] += routed.factors[part, None] * bias

    def look_ahead(self, residual: Tensor, wide: bool) -> None:
        """Read ahead what the router would choose now: from one layer to the next the residual changes little."""
        normed = residual
        if not self.ffn.router_norm:
            ahead = self.work.view("ahead", len(residual), self.work.spec.hidden)
            normed = self.work.block_input(self.i, "ffn", residual, ahead)
        chosen, _ = self.route(normed, residual, wide)
        if not self._alone:
            self._store.prefetch(self.i, dict.fromkeys(chosen.T.ravel().tolist()))  # each token's first choice first

    def _parts(self, expert: int) -> Take:
        """Of a tensor, pairs (first bundle of an expert, uint8 [bundles, stride]): pinned ones, then from the store."""
        stored = _Pieces(self._store.take(self.i, expert))

        def take(tensor: TensorLayout) -> Iterator[tuple[int, Tensor]]:
            yield from self.weights.pinned_of(tensor, expert)
            for blocks, memory in stored.of(tensor.name):
                first = blocks[0].first - expert * tensor.run_stride
                bundles = memory.reshape(-1, tensor.stride)[: tensor.run_bundles - first]
                step = len(bundles) if self.work.device.split_invariant else tensor.block_bundles
                for begin in range(0, len(bundles), step):
                    yield first + begin, bundles[begin : begin + step]

        return take


class _Pieces:
    """What a store gives of an expert, tensor by tensor."""

    def __init__(self, stored: Iterator[tuple[Sequence[Block], Tensor]]) -> None:
        self._stored = stored
        self._next: tuple[Sequence[Block], Tensor] | None = None  # one of another tensor than was asked for

    def of(self, tensor: str) -> Iterator[tuple[Sequence[Block], Tensor]]:
        """Those of a tensor, which come before the next one's."""
        kept, self._next = self._next, None
        for piece in itertools.chain([] if kept is None else [kept], self._stored):
            if piece[0][0].tensor != tensor:
                self._next = piece
                return
            yield piece


class MixtureKind(FfnKind):
    """Every layer with a router. Their experts compete for the same slots, or share a ring."""

    FIGURES = ("expert_cache",)

    @classmethod
    def computes(cls, work: Workspace, i: int) -> bool:
        return work.spec.layers[i].ffn.experts > 0

    def __init__(self, work: Workspace, layers: Sequence[int]) -> None:
        self._work, self._layers = work, layers
        self._tier = work.weights.plan.tier(ExpertTier)
        self._cache = self._make_cache() if self._tier.experts else None
        self.store = self._cache or self._make_stream()
        self.blocks: dict[int, MixtureBlock] = {}
        for i in reversed(layers):
            after = self.blocks[min(self.blocks)] if self.blocks else None
            self.blocks[i] = MixtureBlock(work, i, self.store, after)

    @property
    def wait_s(self) -> float:
        return self.store.wait_s

    def load(self, arrived: Progress) -> None:
        if self._cache is not None:
            self._cache.fill(self._all_experts(), arrived)

    def cancel(self) -> None:
        self.store.abandon()

    def counts(self) -> Counter[str]:
        return self.store.counts.copy()

    def figures(self, counts: Counter[str]) -> dict[str, Any]:
        """Of the cache, None where there is none; what it read is bytes_read_per_token: all else is resident then.

        hits, misses, hit_rate         experts that routers named: wholly in memory by then, or not, and the share of
                                       hits
        prefetched, prefetch_accuracy  experts that began to be read before their router named them, the share it then
                                       named
        """
        if self._cache is None:
            return {}
        named, prefetched = counts["hits"] + counts["misses"], counts["prefetched"]
        found = {
            "hits": counts["hits"],
            "misses": counts["misses"],
            "hit_rate": counts["hits"] / named if named else None,
            "prefetched": prefetched,
            "prefetch_accuracy": counts["useful"] / prefetched if prefetched else None,
        }
        return {"expert_cache": found}

    def remarks(self, figures: Mapping[str, Any]) -> list[str]:
        found = figures.get("expert_cache")
        return [f"{found['hit_rate']:.0%} of experts in memory"] if found and found["hit_rate"] is not None else []

    def _make_cache(self) -> ExpertCache:
        memory = self._work.device.allocate("experts", (self._tier.experts, self._tier.slot_bytes), np.uint8)
        ffns = [layer.ffn for layer in self._work.spec.layers]
        shape = len(ffns), max(ffn.experts for ffn in ffns)
        return ExpertCache(self._work.device, memory, partial(_unpinned, self._work.weights), shape)

    def _make_stream(self) -> ExpertStream:
        plan = self._work.weights.plan
        several = any(self._work.spec.layers[i].ffn.runs > 1 for i in self._layers)
        ring = self._work.device.stream(plan.ring_slots if several else 0, plan.slot_bytes)
        return ExpertStream(ring, partial(_unpinned, self._work.weights))

    def _all_experts(self) -> Iterator[Key]:
        """The first expert of every layer, then the second: the same number of every layer begins in the cache."""
        mixtures = [(i, self._work.spec.layers[i].ffn.experts) for i in self._layers]
        for expert in range(max(experts for _, experts in mixtures)):
            yield from ((i, expert) for i, experts in mixtures if expert < experts > 1)


def _unpinned(weights: Weights, layer: int, expert: int) -> tuple[Block, ...]:
    """Blocks of an expert that the plan does not pin."""
    tensors = weights.layout.neurons(f"{layer}.ffn")
    return tuple(block for tensor in tensors for block in weights.unpinned(tensor, expert))
