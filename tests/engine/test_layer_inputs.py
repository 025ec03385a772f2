"""Layer inputs under budgets: their table is read by row, and drafts have theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashrt.budget.owners import owner_of
from flashrt.storage.pack import Pack
from flashrt_kernels.rows import Codec, row_bytes
from tests.engine.support import logits_of, make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint


@pytest.fixture(scope="module", params=[Codec.F32, Codec.INT4])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    root: Path = tmp_path_factory.mktemp("inputs")
    _, checkpoint = tiny_checkpoint("gemma4-inputs", root / "checkpoint", seed=3, hidden_size_per_layer_input=60)
    return make_pack(checkpoint, root / "pack", request.param)


def test_a_table_that_is_not_in_memory_is_read_by_row(packed: Pack) -> None:
    random = np.random.default_rng(5)
    prompt, tokens = random.integers(3, VOCAB, 37).tolist(), random.integers(3, VOCAB, 9).tolist()
    table = packed.layout.tensors["inputs.embed"]
    results = []
    for share in (0.1, 1.0):
        with tiny_engine(packed, share, chunk=32) as engine:
            pinned = engine.plan.pinned["inputs.embed"]
            assert pinned == (table.blocks if share == 1 else 0)
            results.append(logits_of(engine, prompt, tokens))
    assert np.array_equal(*results)


def test_the_plan_counts_them(packed: Pack) -> None:
    spec, layout = packed.spec, packed.layout
    owners = {name: owner_of(spec, tensor) for name, tensor in layout.tensors.items()}
    assert owners["inputs.embed"] == "embeddings"
    assert {owners[name] for name in ("inputs.project", "3.input_gate", "3.input_out")} == {"layer inputs"}
    with tiny_engine(packed, 1.0, chunk=32) as engine:
        named = [layout.tensors[name].nbytes for name, owner in owners.items() if owner == "layer inputs"]
        assert engine.plan.owners["layer inputs"] == sum(named)
    table = layout.tensors["inputs.embed"]
    with tiny_engine(packed, 0.1, chunk=32) as engine:
        row = -(-row_bytes(table.codec, table.columns) // 4096) * 4096
        others = [t for t in layout.tensors.values() if t.name != "inputs.embed"]
        rest = sum((t.blocks - engine.plan.pinned[t.name] > 0) * t.nbytes for t in others)
        assert engine.plan.streamed_bytes_per_token <= rest + min(row, table.nbytes)


def test_drafts_have_them(packed: Pack) -> None:
    prompt = np.random.default_rng(7).integers(3, VOCAB, 40).tolist() * 2
    texts = []
    for draft in (1, 8):
        with tiny_engine(packed, 0.8, max_draft_tokens=draft, context=160) as engine:
            generation = engine.generate(prompt, 40, ignore_eos=True)
            list(generation)
            texts.append(generation.report.token_ids)
    assert texts[0] == texts[1]
