"""The cache of cells in a plan: where tokens choose of keys and values on disk."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashrt.budget.plan import Plan, Workload
from flashrt.budget.planner import GIB, PEAK_JITTER, plan, resident_budget, slack_bytes, smallest_budget
from flashrt.errors import BudgetError
from flashrt.kv.base import KvLimits
from flashrt.kv.cache import kv_bytes
from flashrt.kv.cells import KvCells
from flashrt.kv.choice import SparseKv
from flashrt.kv.chosen import PART
from flashrt.labels import KvLabels, LayerLabels
from flashrt.spec import Layer, ModelSpec
from flashrt.storage.layout import PackLayout, pack_layout
from flashrt_kernels.rows import Codec
from tests.budget.test_planner import LLAMA_70B, fixed_costs

CONTEXT = 262_144
LLAMA_8B = replace(
    LLAMA_70B,
    hidden=4096,
    layers=(Layer(replace(LLAMA_70B.layers[0].attention, heads=32), LLAMA_70B.layers[0].ffn),) * 32,
)
LAYOUT = pack_layout(LLAMA_8B, Codec.INT4)
WEIGHTS = sum(tensor.nbytes for tensor in LAYOUT.tensors.values())


def sparse(spec: ModelSpec, keep: float, dense: int = 0) -> SparseKv:
    """The first `dense` layers attend to everything."""
    attention = spec.layers[0].attention
    zeros = np.zeros((attention.kv_heads, 32, attention.head_dim), np.float32)
    own = LayerLabels(zeros, zeros, zeros[:, :, 0], zeros[:, :, 0])
    count = len(spec.layers)
    layers = tuple(None if i < dense else own for i in range(count))
    return SparseKv.of(KvLabels("", 8, layers, ((1.0,) * attention.kv_heads,) * count), keep)


def planned(budget: int, workload: Workload, layout: PackLayout = LAYOUT) -> Plan:
    the_plan = plan(LLAMA_8B, layout, budget, workload, fixed_costs())
    assert sum(the_plan.owners.values()) == budget
    assert the_plan.owners["slack"] >= slack_bytes(budget)
    return the_plan


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 12 * GIB), st.sampled_from([1 / 64, 1 / 16, 1 / 3]), st.sampled_from([0, 5]))
def test_every_byte_has_an_owner(extra: int, keep: float, dense: int) -> None:
    workload = Workload(CONTEXT, kv=sparse(LLAMA_8B, keep, dense))
    least = smallest_budget(LLAMA_8B, LAYOUT, workload, fixed_costs())
    the_plan = planned(least + extra, workload)
    far = the_plan.far
    assert far is not None
    assert len(far.heads) == 32 - dense
    assert far.cell_bytes == 4096
    one_layer = 8 * (math.ceil(keep * CONTEXT / 8) + 1)
    assert the_plan.kv_cells >= one_layer
    assert the_plan.owners["KV cells"] == KvCells.nbytes(far, the_plan.kv_cells, max(one_layer, PART))
    assert the_plan.kv_held == 0
    assert the_plan.kv_cell_bytes_per_token == pytest.approx(4096 * (32 - dense) * one_layer, rel=0.01)
    if the_plan.pinned_bytes < the_plan.weight_bytes - WEIGHTS // 8:  # more than embeddings stream
        share = the_plan.kv_cells * far.cell_bytes
        assert share <= max(the_plan.kv_cell_bytes_per_token, one_layer * 4096) * 1.02
    with pytest.raises(BudgetError):
        planned(least - PEAK_JITTER - 4096, workload)


def test_all_is_held_where_there_is_room_for_weights_too_and_never_before() -> None:
    workload = Workload(CONTEXT, kv=sparse(LLAMA_8B, 1 / 16))
    enough = resident_budget(LLAMA_8B, LAYOUT, workload, fixed_costs())
    assert planned(enough, workload).far is None
    shorter = planned(enough - (8 << 20), workload)  # passes
    assert shorter.far is None
    assert shorter.prefill_chunk < planned(enough, workload).prefill_chunk
    below = planned(enough - GIB, workload)
    assert below.far is not None
    assert below.kv_cells > 0.9 * below.far.cells * 32


@pytest.mark.parametrize("context", [300, 527, 528, 529, 600, 1024, 1025, 1500, 4096])
@pytest.mark.parametrize("keep", [1 / 16, 1.0])
def test_short_contexts_take_no_more_than_holding_everything(context: int, keep: float) -> None:
    workload = Workload(context, kv=sparse(LLAMA_8B, keep))
    enough = resident_budget(LLAMA_8B, LAYOUT, workload, fixed_costs())
    for budget in (enough, enough - GIB, smallest_budget(LLAMA_8B, LAYOUT, workload, fixed_costs())):
        the_plan = planned(budget, workload)
        everything = kv_bytes(LLAMA_8B, KvLimits(context, the_plan.prefill_chunk), choices=workload.choices)
        cells = the_plan.owners.get("KV cells", 0)
        if the_plan.far is None:
            assert cells == the_plan.owners.get("KV buffers", 0) == the_plan.kv_cell_bytes_per_token == 0
        else:
            assert the_plan.kv_cells * 4096 <= the_plan.kv_disk_bytes
            assert the_plan.kv_cell_bytes_per_token <= the_plan.kv_disk_bytes
        if budget > enough - 2 * GIB:
            assert the_plan.owners["KV"] + cells <= everything


def test_cells_come_before_embeddings_and_weights_before_more_cells_than_a_token_chooses() -> None:
    workload = Workload(CONTEXT, kv=sparse(LLAMA_8B, 1 / 16))
    before = None
    for gib in (4, 6, 9, 12, 16):
        the_plan = planned(gib * GIB, workload)
        assert the_plan.pinned["embed"] == 0
        if before is not None:
            assert the_plan.kv_cells >= before.kv_cells
            assert the_plan.pinned_bytes >= before.pinned_bytes
        before = the_plan
    assert before is not None
    assert before.kv_cells * 4096 > 1.5 * before.kv_cell_bytes_per_token


def test_where_no_cell_fits_all_is_held_or_the_budget_refused() -> None:
    """Heads of 7 numbers: no block of theirs begins with a page of a disk."""
    attention = replace(LLAMA_8B.layers[0].attention, head_dim=7)
    odd = replace(LLAMA_8B, layers=(Layer(attention, LLAMA_8B.layers[0].ffn),) * 4)
    workload = Workload(CONTEXT, kv=sparse(odd, 1 / 16))
    layout = pack_layout(odd, Codec.INT4)
    both = [smallest_budget(odd, layout, workload, fixed_costs(), stream_kv=stream) for stream in (True, False)]
    assert both[0] == both[1]
    assert plan(odd, layout, both[0], workload, fixed_costs()).far is None
