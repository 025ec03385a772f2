"""Keys and values in eight bits, and values in four: the same bits however they are held, near those of bfloat16."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flashrt.budget.plan import Workload
from flashrt.budget.planner import plan
from flashrt.engine.engine import Engine
from flashrt.engine.runtime import CpuRuntime
from flashrt.errors import BudgetError, SessionError
from flashrt.kv.cache import KINDS
from flashrt.kv.choice import SparseKv
from flashrt.kv.contiguous import ContiguousStore
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.rows import Codec
from tests.engine.support import TorchRuntime, logits_of, make_pack, relative_rms, tiny_engine
from tests.engine.test_tree import PARENTS, along_paths
from tests.families import VOCAB, tiny_checkpoint
from tests.kv.support import spec_labels

CONTEXT = 2000
RANDOM = np.random.default_rng(5)
PROMPT, TOKENS = RANDOM.integers(3, VOCAB, 1150).tolist(), RANDOM.integers(3, VOCAB, 20).tolist()
FEW = pytest.mark.parametrize("codec", [KvCodec.INT8, KvCodec.INT4])


@pytest.fixture(scope="module", params=["qwen2", "gemma3", "deepseek_v3"])
def packed(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    dense = {"first_k_dense_replace": 3} if request.param == "deepseek_v3" else {}  # no router, which jumps at ties
    _, checkpoint = tiny_checkpoint(request.param, root / "checkpoint", seed=3, max_position_embeddings=4096, **dense)
    return make_pack(checkpoint, root / "pack", Codec.INT8)


def engine_of(packed, codec: KvCodec, share: float = 1.0, runtime=None, **options: object) -> Engine:
    return tiny_engine(packed, share, runtime, kv_codec=codec, **{"context": CONTEXT, "chunk": 64, **options})


def text_of(engine: Engine, prompt: list[int], new: int, **options: object) -> list[int]:
    generation = engine.generate(prompt, new, ignore_eos=True, **options)  # type: ignore[arg-type]
    list(generation)
    return generation.report.token_ids


@FEW
def test_memory_and_error(packed, codec):
    with engine_of(packed, KvCodec.BF16) as engine:
        expected, taken = logits_of(engine, PROMPT[:300], TOKENS), engine.plan.owners["KV"]
    with engine_of(packed, codec) as engine:
        found = logits_of(engine, PROMPT[:300], TOKENS)
        assert engine.plan.to_json()["kv_dtype"] == codec.value
        attention = engine.spec.layers[0].attention
        assert engine.plan.owners["KV"] * attention.kv_bytes(KvCodec.BF16) == taken * attention.kv_bytes(codec)
    assert 1e-4 < relative_rms(found, expected) < (0.02 if codec is KvCodec.INT8 else 0.1)
    with engine_of(packed, codec, runtime=TorchRuntime()) as engine:
        error = relative_rms(logits_of(engine, PROMPT[:300], TOKENS), found)
        assert error < (0.01 if codec is KvCodec.INT8 else 0.02)  # other sums round some numbers to the next code


@FEW
def test_the_same_bits_wherever_they_lie(packed, codec):
    """In memory, on disk, in windows, and however the prompt is cut."""
    found = []
    kinds = (ContiguousStore,)
    for share, options in (
        (1.0, {"runtime": CpuRuntime(2, kinds)}),
        (1.0, {"chunk": 512}),
        (0.3, {}),
        (0.2, {"stream_kv": True, "context": 4000}),
        (0.6, {"stream_kv": True, "chunk": 32}),
    ):
        with engine_of(packed, codec, share, **options) as engine:
            found.append(logits_of(engine, PROMPT, TOKENS))
            assert engine.plan.far is not None or share != 0.2
    assert all(np.array_equal(result, found[0]) for result in found)


@FEW
def test_a_tree_has_the_bits_of_its_paths(packed, codec):
    tree = TOKENS[: len(PARENTS)]
    with engine_of(packed, codec, logit_rows=16) as engine:
        expected = along_paths(engine, PROMPT[:300], tree, PARENTS)
        engine.sequence.rewind(0)
        engine.runner.prefill(engine.sequence, PROMPT[:300])
        assert np.array_equal(engine.runner.step_tree(engine.sequence, tree, PARENTS), expected)


@FEW
def test_drafts_change_nothing(packed, codec):
    with engine_of(packed, codec) as engine:
        expected = text_of(engine, PROMPT[:200], 40)
    with engine_of(packed, codec, 0.5, max_draft_tokens=12) as engine:
        assert text_of(engine, PROMPT[:200], 40) == expected


@FEW
def test_few_positions_are_chosen_of_them(codec, tmp_path, monkeypatch):
    """By labels of the keys that are held; where all are chosen, the bits are those of exact attention."""
    monkeypatch.setattr("flashrt.kv.choice.LEAST", 8)
    _, checkpoint = tiny_checkpoint("llama", tmp_path / "checkpoint", seed=3, max_position_embeddings=4096)
    packed = make_pack(checkpoint, tmp_path / "pack", Codec.INT8)
    with engine_of(packed, codec) as engine:
        exact = logits_of(engine, PROMPT, TOKENS)
    labels, found = spec_labels(packed.spec), {}
    for keep in (1.0, 1 / 8):
        with engine_of(packed, codec, kv=SparseKv.of(labels, keep)) as engine:
            found[keep] = logits_of(engine, PROMPT, TOKENS)
    assert np.array_equal(found[1.0], exact)
    assert np.array_equal(found[1 / 8][0], exact[0])  # a prompt attends to everything
    assert 1e-4 < relative_rms(found[1 / 8][1:], exact[1:]) < 1


@FEW
def test_a_session_goes_on_and_is_bound_to_how_it_was_held(packed, codec, tmp_path):
    with engine_of(packed, codec) as engine:
        text = text_of(engine, PROMPT, 10)
        engine.save(tmp_path / "session")
        expected = text_of(engine, [*PROMPT, *text, 7], 20, reuse=True)
    for kinds in ((ContiguousStore,), KINDS):
        with engine_of(packed, codec, runtime=CpuRuntime(2, kinds)) as engine:
            engine.resume(tmp_path / "session")
            assert text_of(engine, [*PROMPT, *text, 7], 20, reuse=True) == expected
    for other in set(KvCodec) - {codec}:
        with engine_of(packed, other) as engine, pytest.raises(SessionError, match="--kv-dtype"):
            engine.resume(tmp_path / "session")


def test_what_cannot_be_chosen_on_disk_is_named(tmp_path):
    _, checkpoint = tiny_checkpoint("llama", tmp_path / "checkpoint", seed=3, max_position_embeddings=1 << 17)
    packed = make_pack(checkpoint, tmp_path / "pack", Codec.INT8)
    workload = Workload(1 << 17, kv=SparseKv.of(spec_labels(packed.spec), 1 / 16))
    costs = replace(CpuRuntime(2).fixed_costs(packed), kv_codec=KvCodec.INT8)
    with pytest.raises(BudgetError, match="A shorter --context needs less, and with --kv-dtype bf16 older tokens are"):
        plan(packed.spec, packed.layout, 1 << 20, workload, costs)
