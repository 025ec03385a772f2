"""How memory is divided among the windows of layers: what is given is used, and no layer gets more than it can use."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from flashrt.budget.claims.rows import RowMemory, RowTier, divide_windows
from flashrt.budget.plan import FixedCosts, Workload
from flashrt.budget.planner import MIB, PEAK_JITTER, plan, resident_budget, smallest_budget
from flashrt.sparsity import RowSparsity, Sparsity
from flashrt.spec import Attention, Ffn, Layer, ModelSpec
from flashrt.storage.layout import PackLayout, pack_layout
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.rows import Codec


def spec(neurons: int, layers: int) -> ModelSpec:
    layer = Layer(Attention(4, 4, 32, 0.2), Ffn(neurons, "relu", gated=False, bias=True))
    return ModelSpec("opt", 3000, 128, (layer,) * layers, 512, norm="layer", positions=514, position_offset=2)


def layout(neurons: int, rows: list[float], codec: Codec = Codec.INT8) -> PackLayout:
    layers = tuple(RowSparsity(64, 0.0, (min(r, neurons), min(r, neurons) / 2, 0.0)) for r in rows)
    return pack_layout(spec(neurons, len(rows)), codec, 1 << 16, Sparsity("base", 0.01, 0.01, layers))


counts = st.lists(st.floats(0, 5000), min_size=1, max_size=5)


@given(st.integers(1, 5000), counts, st.floats(0, 1.5))
def test_windows_fill_what_they_are_given(neurons: int, rows: list[float], share: float) -> None:
    packed = layout(neurons, rows)
    layers = [RowMemory(packed.tensors[f"{i}.ffn"], sparsity) for i, sparsity in enumerate(packed.rows)]
    stride, least = layers[0].tensor.stride, sum(layer.least for layer in layers)
    free = least * stride + int(share * neurons * stride * len(layers))
    windows = divide_windows(layers, {layer.tensor.name: 0 for layer in layers}, free)
    used = sum(windows.values()) * stride
    assert used <= free
    assert all(layer.least <= windows[layer.tensor.name] <= neurons for layer in layers)
    assert used >= min(free, neurons * stride * len(layers)) - len(layers) * stride
    by_need = sorted(layers, key=lambda layer: layer.sparsity.misses[0])
    sizes = [windows[layer.tensor.name] for layer in by_need]
    assert all(a <= b + 1 for a, b in itertools.pairwise(sizes))


@given(st.integers(200, 5000), counts, st.floats(0, 1))
def test_plans_give_every_byte_an_owner(neurons: int, rows: list[float], share: float) -> None:
    packed, shape = layout(neurons, rows), spec(neurons, len(rows))
    workload, costs = Workload(256), FixedCosts(60 * MIB, 70 * MIB, KvCodec.BF16, lambda tokens, context: 4096 * tokens)
    arguments = (shape, packed)
    least, enough = (f(*arguments, workload, costs) for f in (smallest_budget, resident_budget))
    budget = int(least - PEAK_JITTER + share * max(enough - least, 0))
    found = plan(*arguments, budget, workload, costs)
    assert sum(found.owners.values()) == budget
    assert min(found.owners.values()) >= 0
    assert found.owners["predictors"] > 0
    held = sum(found.tier(RowTier).slots.values()) * packed.tensors["0.ffn"].stride
    assert found.owners.get("FFN", 0) >= held
    assert all(found.pinned[name] == t.blocks for name, t in packed.tensors.items() if ".predictor." in name)
    everything = plan(*arguments, enough, workload, costs)
    assert everything.resident
    assert not everything.tier(RowTier).slots
    assert found.streamed_bytes_per_token >= everything.streamed_bytes_per_token
