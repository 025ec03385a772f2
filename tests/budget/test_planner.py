"""The planner is pure, so its promises are properties: over shapes, budgets and workloads."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flashrt.budget.claims.experts import ExpertTier
from flashrt.budget.plan import FixedCosts, Workload
from flashrt.budget.planner import (
    CHUNKS,
    GIB,
    MIB,
    PEAK_JITTER,
    ceil_gib,
    owner_of,
    plan,
    prefix_bytes,
    resident_budget,
    slack_bytes,
    smallest_budget,
)
from flashrt.errors import BudgetError
from flashrt.kv.base import KvLimits
from flashrt.kv.cache import RESIDENT_KINDS, kv_bytes
from flashrt.rope import Rope
from flashrt.spec import Attention, Ffn, Layer, ModelSpec
from flashrt.storage.layout import PAGE, TensorLayout, pack_layout
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.rows import DTYPES, Codec

LLAMA_70B = ModelSpec(
    family="llama",
    vocab=32000,
    hidden=8192,
    layers=(Layer(Attention(64, 8, 128, 128**-0.5, Rope(1e4)), Ffn(28672, "silu")),) * 80,
    context=4096,
)
MIXTRAL = ModelSpec(
    family="mixtral",
    vocab=32000,
    hidden=4096,
    layers=(Layer(Attention(32, 8, 128, 128**-0.5, Rope(1e6)), Ffn(14336, "silu", experts=8, experts_per_token=2)),)
    * 32,
    context=32768,
)


def fixed_costs(runtime: int = 60 * MIB, peak: int = 70 * MIB) -> FixedCosts:
    return FixedCosts(runtime, peak, KvCodec.BF16, lambda tokens, context: 4096 * tokens)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    kv_heads = draw(st.integers(1, 4))
    attention = Attention(kv_heads * draw(st.integers(1, 4)), kv_heads, draw(st.sampled_from([16, 64, 100])), 1.0)
    experts = draw(st.sampled_from([0, 0, 8]))
    ffn = Ffn(
        draw(st.integers(1, 3000)),
        "silu",
        gated=draw(st.booleans()),
        experts=experts,
        experts_per_token=min(experts, 2),
    )
    return ModelSpec(
        family="any",
        vocab=draw(st.integers(1, 50_000)),
        hidden=draw(st.integers(1, 1500)),
        layers=(Layer(attention, ffn),) * draw(st.integers(1, 6)),
        context=4096,
        tied=draw(st.booleans()),
    )


def caches_beside(spec: ModelSpec, tensor: TensorLayout) -> bool:
    """Whether a tensor has to be resident before experts get slots."""
    return owner_of(spec, tensor) not in ("experts", "embeddings")


def nobody_counts(budget: int) -> int:
    """Bytes that a process is sure to take beside what it asks for: page tables, and stacks of 32 threads that read."""
    return budget // PAGE * 8 + 32 * (128 << 10)


workloads = st.builds(
    Workload,
    context=st.integers(1, 4096),
    prompt=st.none() | st.integers(1, 4096),
    logit_rows=st.sampled_from([1, 16]),
    scoring=st.booleans(),
)
codecs = st.sampled_from(DTYPES)
extras = st.integers(0, 400 * MIB)  # bytes above the smallest budget


@given(specs(), codecs, workloads, extras)
@settings(max_examples=200, deadline=None)
def test_every_byte_has_one_owner(spec: ModelSpec, codec: Codec, workload: Workload, extra: int) -> None:
    layout = pack_layout(spec, codec)
    budget = smallest_budget(spec, layout, workload, fixed_costs()) + extra
    the_plan = plan(spec, layout, budget, workload, fixed_costs())
    assert sum(the_plan.owners.values()) == budget == the_plan.budget_bytes
    assert min(the_plan.owners.values()) >= 0
    assert the_plan.owners["slack"] >= max(slack_bytes(budget), nobody_counts(budget))
    assert the_plan.owners["KV"] == kv_bytes(spec, the_plan.kv_limits)
    assert the_plan.prefill_chunk in CHUNKS


@given(specs(), codecs, workloads, extras)
@settings(max_examples=200, deadline=None)
def test_pinned_blocks_are_those_that_are_paid_for(
    spec: ModelSpec, codec: Codec, workload: Workload, extra: int
) -> None:
    layout = pack_layout(spec, codec)
    budget = smallest_budget(spec, layout, workload, fixed_costs()) + extra
    the_plan = plan(spec, layout, budget, workload, fixed_costs())
    assert set(the_plan.pinned) == set(layout.tensors)
    by_owner: dict[str, int] = {}
    for name, tensor in layout.tensors.items():
        assert 0 <= the_plan.pinned[name] <= tensor.blocks
        owner = owner_of(spec, tensor)
        by_owner[owner] = by_owner.get(owner, 0) + prefix_bytes(tensor, the_plan.pinned[name])
    if the_plan.tier(ExpertTier).experts:
        by_owner["experts"] += the_plan.tier(ExpertTier).nbytes
    for owner, nbytes in by_owner.items():
        assert the_plan.owners.get(owner, 0) == nbytes
    assert the_plan.pinned_bytes == sum(by_owner.values()) <= the_plan.weight_bytes
    everything = the_plan.pinned_bytes == the_plan.weight_bytes
    assert the_plan.resident == (everything and the_plan.far is None)
    if the_plan.tier(ExpertTier).experts:
        assert the_plan.ring_slots == 0 or the_plan.far is not None, (
            "all but experts and embeddings is resident: there is nothing for a ring"
        )
        assert the_plan.tier(ExpertTier).experts >= 2 * spec.layers[0].ffn.experts_per_token
        assert all(t.blocks == the_plan.pinned[t.name] for t in layout.tensors.values() if caches_beside(spec, t))
    elif not everything:
        assert the_plan.ring_slots >= 2
        rings = 2 if spec.layers[0].ffn.experts else 1
        assert the_plan.owners["stream buffers"] == rings * the_plan.ring_slots * the_plan.slot_bytes
        assert the_plan.slot_bytes >= max(t.max_block_bytes for t in layout.tensors.values())


@given(specs(), codecs, workloads, extras, st.integers(0, 200 * MIB))
@settings(max_examples=200, deadline=None)
def test_more_budget_never_streams_more(
    spec: ModelSpec, codec: Codec, workload: Workload, extra: int, more: int
) -> None:
    """At the same prefill chunk and ring: both are stepped up at times, and then take from the weights.

    So do keys and values, once they no longer lie on disk. Passes are shorter where that keeps all weights in memory.
    """
    layout = pack_layout(spec, codec)
    budget = smallest_budget(spec, layout, workload, fixed_costs()) + extra
    less, greater = (plan(spec, layout, b, workload, fixed_costs()) for b in (budget, budget + more))
    assume((less.far is None) == (greater.far is None))
    assert greater.prefill_chunk >= less.prefill_chunk or greater.pinned_bytes == greater.weight_bytes
    assume((less.prefill_chunk, less.ring_slots) == (greater.prefill_chunk, greater.ring_slots))
    assert greater.pinned_bytes >= less.pinned_bytes
    assert greater.streamed_bytes_per_token <= less.streamed_bytes_per_token


@given(specs(), codecs, workloads, st.integers(1, 1 << 30))
@settings(max_examples=200, deadline=None)
def test_smallest_budget_is_admitted_and_less_is_refused(
    spec: ModelSpec, codec: Codec, workload: Workload, peak: int
) -> None:
    layout, costs = pack_layout(spec, codec), fixed_costs(peak=peak)
    smallest = smallest_budget(spec, layout, workload, costs)
    assert smallest >= peak
    plan(spec, layout, smallest, workload, costs)
    with pytest.raises(BudgetError) as refusal:
        plan(spec, layout, smallest - PEAK_JITTER - PAGE, workload, costs)
    named = re.search(r"the smallest that would do is ([\d.]+) GiB", str(refusal.value))
    assert named
    assert float(named[1]) == ceil_gib(smallest)
    plan(spec, layout, int(float(named[1]) * GIB), workload, costs)  # the figure printed is one that suffices


@given(specs(), codecs, workloads, st.integers(0, 100 * MIB))
@settings(max_examples=200, deadline=None)
def test_resident_budget_reads_nothing_while_decoding(
    spec: ModelSpec, codec: Codec, workload: Workload, more: int
) -> None:
    layout = pack_layout(spec, codec)
    enough = resident_budget(spec, layout, workload, fixed_costs())
    for budget in (enough, enough + more):
        the_plan = plan(spec, layout, budget, workload, fixed_costs())
        assert the_plan.resident
        assert the_plan.pinned_bytes == the_plan.weight_bytes
        assert the_plan.ring_slots == 0


@pytest.mark.parametrize("codec", DTYPES)
@pytest.mark.parametrize("spec", [LLAMA_70B, MIXTRAL], ids=["llama-2-70b", "mixtral"])
def test_an_idle_budget_is_a_defect(spec: ModelSpec, codec: Codec) -> None:
    """When the model is larger than the budget, next to nothing is left unowned."""
    layout = pack_layout(spec, codec)
    for gib in (1, 2, 3, 8, 16):
        the_plan = plan(spec, layout, gib * GIB, Workload(1024), fixed_costs())
        assert not the_plan.resident
        largest = max(t.max_block_bytes for t in layout.tensors.values())
        assert the_plan.owners["slack"] - slack_bytes(gib * GIB) < 4 * largest


def test_layers_stream_the_same_share() -> None:
    layout = pack_layout(LLAMA_70B, Codec.INT4)
    the_plan = plan(LLAMA_70B, layout, 8 * GIB, Workload(1024), fixed_costs())
    shares = {the_plan.pinned[f"{i}.ffn"] for i in range(80)}
    assert max(shares) - min(shares) <= 1
    assert all(the_plan.pinned[f"{i}.qkv"] == layout.tensors[f"{i}.qkv"].blocks for i in range(80))


def test_a_70b_holds_an_eighth_to_a_quarter_of_its_weights_in_8_gib() -> None:
    layout = pack_layout(LLAMA_70B, Codec.INT4)
    the_plan = plan(LLAMA_70B, layout, 8 * GIB, Workload(4096), fixed_costs())
    assert 1 / 8 < the_plan.pinned_bytes / the_plan.weight_bytes < 0.25


def test_requests_are_paid_for_first() -> None:
    """What a server reads and writes stands in the plan, and the smallest budget grows by it."""
    layout = pack_layout(LLAMA_70B, Codec.INT4)
    without, beside = Workload(1024), Workload(1024, request_bytes=50 * MIB)
    assert plan(LLAMA_70B, layout, 8 * GIB, beside, fixed_costs()).owners["requests"] == 50 * MIB
    assert "requests" not in plan(LLAMA_70B, layout, 8 * GIB, without, fixed_costs()).owners
    least, more = (smallest_budget(LLAMA_70B, layout, workload, fixed_costs()) for workload in (without, beside))
    assert 50 * MIB <= more - least < 51 * MIB


def test_planning_is_pure() -> None:
    layout = pack_layout(MIXTRAL, Codec.INT4)
    assert plan(MIXTRAL, layout, 4 * GIB, Workload(512), fixed_costs()) == plan(
        MIXTRAL, layout, 4 * GIB, Workload(512), fixed_costs()
    )


def test_one_expert_in_four_is_read_for_a_token() -> None:
    layout = pack_layout(MIXTRAL, Codec.INT4)
    the_plan = plan(MIXTRAL, layout, 4 * GIB, Workload(512), fixed_costs())
    experts = [t for t in layout.tensors.values() if t.runs == 8]
    rest = sum(t.nbytes - prefix_bytes(t, the_plan.pinned[t.name]) for t in experts)
    cached = the_plan.tier(ExpertTier).nbytes
    assert 0 < cached == the_plan.owners["experts"] - sum(t.nbytes for t in experts) + rest
    assert the_plan.streamed_bytes_per_token == pytest.approx((rest - cached) / 4, rel=0.01)


def test_too_few_experts_to_cache_are_pinned_in_blocks() -> None:
    layout = pack_layout(MIXTRAL, Codec.INT4)
    plans = [plan(MIXTRAL, layout, int(gib * GIB), Workload(512), fixed_costs()) for gib in (1.0, 1.2, 1.5)]
    assert [p.tier(ExpertTier).experts for p in plans[:2]] == [0, 0]
    assert plans[1].ring_slots >= 2
    assert plans[1].owners["experts"] > 0
    assert plans[2].tier(ExpertTier).experts >= 4
    assert plans[2].streamed_bytes_per_token < plans[1].streamed_bytes_per_token


def test_a_long_context_is_named_as_the_reason() -> None:
    layout = pack_layout(LLAMA_70B, Codec.INT4)
    costs = replace(fixed_costs(), kv_kinds=RESIDENT_KINDS)
    with pytest.raises(BudgetError, match=r"context of 32768 tokens.*KV 10240 MiB.*shorter --context"):
        plan(LLAMA_70B, layout, GIB, Workload(32768), costs)


LONG = Workload(context=100_000)


def test_keys_and_values_leave_memory_only_where_they_must() -> None:
    """Below the smallest budget that holds them all, and never above it."""
    layout = pack_layout(LLAMA_70B, Codec.INT4)
    resident = smallest_budget(LLAMA_70B, layout, LONG, fixed_costs(), stream_kv=False)
    streamed = smallest_budget(LLAMA_70B, layout, LONG, fixed_costs())
    assert resident > 30 * GIB
    assert streamed < 2 * GIB
    for budget in (resident, resident - PEAK_JITTER):
        the_plan = plan(LLAMA_70B, layout, budget, LONG, fixed_costs())
        assert the_plan.far is the_plan.kv_held is None
        assert the_plan.kv_disk_bytes == 0
    for budget in (resident - PEAK_JITTER - 1, streamed, 10 * GIB):
        the_plan = plan(LLAMA_70B, layout, budget, LONG, fixed_costs())
        assert the_plan.far is not None
        assert sum(the_plan.owners.values()) == budget
        assert the_plan.owners["slack"] >= slack_bytes(budget)
        in_memory = kv_bytes(LLAMA_70B, the_plan.kv_limits)
        assert the_plan.owners["KV"] == in_memory
        everything = kv_bytes(LLAMA_70B, KvLimits(LONG.context, the_plan.prefill_chunk))
        assert everything <= in_memory + the_plan.kv_disk_bytes <= 1.02 * everything
        assert the_plan.streamed_bytes_per_token > the_plan.kv_disk_bytes
        assert the_plan.ring_slots >= 2
        assert the_plan.slot_bytes >= the_plan.far.largest
    with pytest.raises(BudgetError, match=rf"smallest that would do is {ceil_gib(streamed):.3f} GiB"):
        plan(LLAMA_70B, layout, streamed - PEAK_JITTER - PAGE, LONG, fixed_costs())


def test_what_weights_leave_holds_pages() -> None:
    """Also a ring where no weight needs it."""
    layout = pack_layout(LLAMA_70B, Codec.INT4)
    long = Workload(context=1_000_000)
    weights = sum(t.nbytes for t in layout.tensors.values())
    before = -1
    for extra in (4, 12, 60):
        the_plan = plan(LLAMA_70B, layout, weights + extra * GIB, long, fixed_costs())
        assert the_plan.pinned_bytes == the_plan.weight_bytes
        assert the_plan.kv_held is not None
        assert the_plan.kv_held > before
        before = the_plan.kv_held
        assert the_plan.streamed_bytes_per_token == the_plan.kv_disk_bytes
        assert not the_plan.resident
        assert the_plan.ring_slots >= 2
        assert the_plan.owners["slack"] - slack_bytes(the_plan.budget_bytes) < 0.02 * the_plan.budget_bytes


def test_kinds_that_do_not_stream_are_not_streamed() -> None:
    layout, costs = pack_layout(LLAMA_70B, Codec.INT4), replace(fixed_costs(), kv_kinds=RESIDENT_KINDS)
    sizes = {smallest_budget(LLAMA_70B, layout, LONG, costs, stream_kv=stream) for stream in (True, False)}
    assert len(sizes) == 1
    with pytest.raises(BudgetError, match="shorter --context"):
        plan(LLAMA_70B, layout, 10 * GIB, LONG, costs)
