"""A kind of feed-forward block that flashrt knows nothing of: one class for its blocks, one claim, and no other change.

It holds all neurons in memory of its own, in reverse, and finds them by their slots.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from flashrt.budget.claims.base import Claim
from flashrt.budget.claims.registry import CLAIMS
from flashrt.budget.plan import TierPlan
from flashrt.cli.plan import _lines
from flashrt.cli.run import figures
from flashrt.model.ffn.base import FfnBlock, FfnKind
from flashrt.model.ffn.choose import KINDS
from flashrt_kernels.ffn import FfnWeights
from flashrt_kernels.rows import Codec
from tests.engine.support import logits_of, make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint


@dataclass(frozen=True)
class ReversedTier(TierPlan):
    layers: tuple[str, ...] = ()

    def to_json(self):
        return {"reversed_layers": len(self.layers)}

    def lines(self, size):
        return {"reversed": f"{len(self.layers)} layers"}


class ReversedClaim(Claim):
    def fixed(self):
        return {"reversed": sum(t.nbytes for t in self.case.tensors("FFN"))}

    def grant(self, free, pinned, ring):
        tensors = self.case.tensors("FFN")
        return ReversedTier(reads={t.name: 0 for t in tensors}, layers=tuple(t.name for t in tensors))


class ReversedBlock(FfnBlock):
    def __init__(self, work, i):
        super().__init__(work, i)
        self.tensor = work.layout.tensors[f"{i}.ffn"]
        self.memory = work.device.allocate("reversed", (self.tensor.run_stride, self.tensor.stride), np.uint8)
        self.slots = np.arange(self.tensor.run_stride, dtype=np.int32)[::-1][: self.tensor.run_bundles].copy()
        self.computed = 0

    def expect(self, wide):
        return ()

    def load(self, arrived):
        window = np.empty_like(self.memory)
        blocks = map(self.tensor.block, range(self.tensor.blocks))
        places = ((block, window[block.first : block.first + block.bundles].reshape(-1)) for block in blocks)
        self.work.device.fill(places, arrived)
        self.memory[:] = window[::-1]

    def prefill(self, x, y, tokens):
        for begin in range(0, len(self.slots), 512):
            bundles = self.memory[self.slots[begin : begin + 512]]
            self.work.ops.gemm_glu(x, self.neurons(bundles, begin), y, None, self.work.scratch)

    def decode(self, x, y, tokens):
        assert len(tokens.positions) == len(x)
        self.computed += len(x)
        self.work.ops.glu(x, self.neurons(self.memory, 0), y, slots=self.slots)

    def neurons(self, bundles, first):
        bias = None if self.bias is None else self.bias[first : first + len(bundles)]
        return FfnWeights(bundles, self.tensor.codec, self.ffn.activation, self.ffn.gated, bias)


class ReversedKind(FfnKind):
    FIGURES = ("reversed_tokens",)

    @classmethod
    def computes(cls, work, i):
        return f"{i}.ffn" in work.weights.plan.tier(ReversedTier).layers

    def __init__(self, work, layers):
        self.blocks = {i: ReversedBlock(work, i) for i in layers}

    def load(self, arrived):
        for block in self.blocks.values():
            block.load(arrived)

    def counts(self):
        return Counter(reversed=sum(block.computed for block in self.blocks.values()))

    def figures(self, counts):
        return {"reversed_tokens": counts["reversed"] // len(self.blocks)}

    def remarks(self, figures):
        return [f"{figures['reversed_tokens']} tokens in reverse"]


@pytest.fixture(scope="module", params=[("llama", Codec.INT4), ("opt", Codec.INT8)], ids=["gated", "biased"])
def packed(request, tmp_path_factory):
    family, codec = request.param
    root = tmp_path_factory.mktemp(family)
    wide = {"ffn_dim": 700} if family == "opt" else {"intermediate_size": 700}
    _, checkpoint = tiny_checkpoint(family, root / "checkpoint", seed=5, **wide)
    return make_pack(checkpoint, root / "pack", codec)


def toy_engine(packed, share):
    return tiny_engine(packed, share, chunk=16, claims=(*CLAIMS, ReversedClaim), kinds=(ReversedKind, *KINDS))


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_new_kind_computes_the_same_tokens(packed, share):
    rng = np.random.default_rng(8)
    prompt, rest = rng.integers(3, VOCAB, 29).tolist(), rng.integers(3, VOCAB, 20).tolist()
    with tiny_engine(packed, 0.5, chunk=16) as engine:
        expected = logits_of(engine, prompt, rest)
    with toy_engine(packed, share) as engine:
        assert all(isinstance(block, ReversedBlock) for block in engine.runner.decoder.ffns.blocks)
        assert np.array_equal(logits_of(engine, prompt, rest), expected)
        assert (engine.plan.ring_slots > 0) == (share < 1)


def test_a_new_kind_is_planned_and_reported(packed):
    prompt = np.random.default_rng(9).integers(3, VOCAB, 20).tolist()
    with toy_engine(packed, 0.3) as engine:
        held = sum(packed.layout.tensors[f"{i}.ffn"].nbytes for i in range(len(packed.spec.layers)))
        assert engine.plan.owners["reversed"] == held
        assert sum(engine.plan.owners.values()) == engine.plan.budget_bytes
        assert engine.plan.to_json()["reversed_layers"] == len(packed.spec.layers)
        extra = {"resident_share": 0.5, "expected_tok_per_s": None, "smallest_budget_bytes": 1}
        extra |= {"download_bytes": None, "pack_bytes": 1, "reads_file": None, "together": None}
        assert f"reversed          {len(packed.spec.layers)} layers" in _lines(engine.plan, extra)
        generation = engine.generate(prompt, 6, ignore_eos=True)
        list(generation)
    report = generation.report.to_json()
    assert report["reversed_tokens"] == 5
    assert report["expert_cache"] is report["ffn_bytes_share"] is report["row_hit_rate"] is None
    assert "5 tokens in reverse" in figures(generation.report)
