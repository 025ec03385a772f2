"""Models with recurrent layers: what is computed again, sequences that are cut back, sessions, plans and damage."""

from __future__ import annotations

import json
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flashrt.budget.plan import FixedCosts, Workload
from flashrt.budget.planner import GIB, plan, smallest_budget
from flashrt.calibration.kv_pipeline import labelled_layers
from flashrt.calibration.methods import method_for
from flashrt.config import Sampling
from flashrt.engine.engine import Engine
from flashrt.errors import DiskError, PackError, SessionError, UnsupportedModelError
from flashrt.kv.recurrent import RecurrentStore
from flashrt.model.decoder import Decoder
from flashrt.rope import Rope
from flashrt.spec import Attention, DeltaNet, Ffn, Layer, ModelSpec
from flashrt.storage import _io
from flashrt.storage.layout import pack_layout
from flashrt.storage.pack import Pack
from flashrt_kernels import ops
from flashrt_kernels.kv import KvCodec
from flashrt_kernels.rows import Codec
from tests.engine.support import logits_of, make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint, tiny_gguf
from tests.kept import keep

CONTEXT = 3400
PROMPT = np.random.default_rng(5).integers(3, VOCAB, 3000).tolist()
MORE = np.random.default_rng(6).integers(3, VOCAB, 50).tolist()
DRAWN = Sampling(temperature=1.0, seed=7)
HEADS_OF_16 = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
HEAD = struct.Struct("<16s4I")


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Pack:
    root = tmp_path_factory.mktemp("hybrid")
    _, checkpoint = tiny_checkpoint("qwen3_5_text", root / "checkpoint", 3, max_position_embeddings=4096)
    return make_pack(checkpoint, root / "pack", Codec.INT8)


def engine_of(packed: Pack, share: float = 1.0, **options) -> Engine:
    return tiny_engine(packed, share, **{"context": CONTEXT, "chunk": 256} | options)


def text_of(engine: Engine, prompt: list[int], new: int, **options) -> list[int]:
    generation = engine.generate(prompt, new, DRAWN, ignore_eos=True, **options)
    list(generation)
    return generation.report.token_ids


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Rows of each wide pass from now on."""
    rows: list[int] = []
    forward = Decoder.forward

    def counting(decoder, batch):
        if batch.wide:
            rows.append(len(batch))
        return forward(decoder, batch)

    monkeypatch.setattr(Decoder, "forward", counting)
    return rows


def test_a_prompt_that_grows_computes_what_is_new(packed, tmp_path, computed):
    """And 17 tokens before it, whose computation gives the text that there is without what was kept."""
    longer = PROMPT + MORE
    with engine_of(packed) as engine:
        expected = text_of(engine, longer, 20)
    with engine_of(packed, max_draft_tokens=8) as engine:
        engine.keep_sessions(tmp_path / "directory", 1 << 30)
        text_of(engine, PROMPT, 20)
        engine.save(tmp_path / "saved")
        computed.clear()
        assert text_of(engine, longer, 20, reuse=True) == expected
        assert sum(computed) == len(MORE) + 17
        computed.clear()
        assert text_of(engine, longer, 20, reuse=True) == expected  # the same prompt again
        assert sum(computed) == 17
        computed.clear()
        edited = [*longer[:-300], *MORE]
        assert len(text_of(engine, edited, 5, reuse=True)) == 5
        assert sum(computed) == len(edited) - 2048  # the last multiple of 1,024 before the edit
    for name in ("saved", "directory"):  # in other processes
        with engine_of(packed, 0.4, chunk=64) as engine:
            if name == "saved":
                engine.resume(tmp_path / name, longer)
            else:
                engine.keep_sessions(tmp_path / name, 1 << 30)
            computed.clear()
            assert text_of(engine, longer, 20, reuse=True) == expected
            assert sum(computed) in (17, len(MORE) + 17)


def test_a_conversation_depends_neither_on_the_budget_nor_on_drafts(packed):
    """Beginnings that are shared to any length, and edits that go back to marks or to nothing."""
    found = []
    for share, chunk, draft in ((1.0, 256, 1), (0.3, 16, 8), (0.6, 512, 4)):
        with engine_of(packed, share, chunk=chunk, max_draft_tokens=draft) as engine:
            text, texts = PROMPT[:1100], []
            for keep, more in ((1100, 0), (1100, 3), (1125, 30), (1083, 40), (1130, 5), (900, 200), (1000, 17)):
                text = [*text[:keep], *MORE[:more], *PROMPT[:more]][: CONTEXT - 40]
                text = [*text, *text_of(engine, text, 25, reuse=True)]
                texts.append((list(text), engine.sequence.kv.marks()))
            found.append(texts)
    assert found[0] == found[1] == found[2]


def test_older_keys_and_values_on_disk_give_the_same_text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wide = {"head_dim": 64, "num_key_value_heads": 6, "max_position_embeddings": 16384}
    packed = make_pack(
        tiny_checkpoint("qwen3_next", tmp_path / "checkpoint", 3, **wide)[1], tmp_path / "pack", Codec.INT8
    )
    with (
        engine_of(packed, context=9000) as whole,
        engine_of(packed, 0.3, stream_kv=True, context=9000, chunk=64, max_draft_tokens=8) as far,
    ):
        assert far.plan.far is not None
        for prompt in (PROMPT[:2000], [*PROMPT[:2000], *MORE], PROMPT[:900]):
            assert text_of(far, prompt, 30, reuse=True) == text_of(whole, prompt, 30, reuse=True)
        assert far.sequence.kv.far(far.sequence.length, 1) > 0


@pytest.mark.parametrize("call", [0, 1, 4, 7, 11])
def test_a_prompt_that_is_interrupted_leaves_the_engine_usable(packed, tmp_path, monkeypatch, call):
    with engine_of(packed) as engine:
        expected = text_of(engine, [*PROMPT[:1200], *MORE], 10)
        text_of(engine, PROMPT[:1200], 10)
        mix, calls = RecurrentStore.mix, []

        def interrupted(*arguments):
            calls.append(arguments)
            mix(*arguments)
            if len(calls) == call + 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(RecurrentStore, "mix", interrupted)
            with pytest.raises(KeyboardInterrupt):
                text_of(engine, [*PROMPT[:1200], *MORE, 9], 10, reuse=True)
        engine.save(tmp_path / "session")
        assert text_of(engine, [*PROMPT[:1200], *MORE], 10, reuse=True) == expected
        engine.resume(tmp_path / "session")
        assert text_of(engine, [*PROMPT[:1200], *MORE], 10, reuse=True) == expected


@pytest.mark.parametrize("failure", [KeyboardInterrupt, DiskError])
@pytest.mark.parametrize("call", [1, 3, 8, 14, 20])
def test_a_prompt_that_fails_is_kept_as_far_as_all_layers_have_it(packed, tmp_path, monkeypatch, call, failure):
    """Whatever it was that failed is what the caller sees."""
    with engine_of(packed) as engine:
        engine.keep_sessions(tmp_path / "kept", 1 << 30)
        mix, calls = RecurrentStore.mix, []

        def failing(*arguments):
            calls.append(arguments)
            mix(*arguments)
            if len(calls) == call + 1:
                raise failure("in the middle")

        with monkeypatch.context() as patched, warnings.catch_warnings():
            warnings.simplefilter("error")
            patched.setattr(RecurrentStore, "mix", failing)
            with pytest.raises(failure):
                text_of(engine, PROMPT[:1500], 10, reuse=True)
        found = text_of(engine, PROMPT[:1500], 10, reuse=True)
    with engine_of(packed) as engine:
        assert text_of(engine, PROMPT[:1500], 10) == found
        engine.keep_sessions(tmp_path / "kept", 1 << 30)
        assert text_of(engine, PROMPT[:1500], 10, reuse=True) == found


def test_weights_of_a_file_are_kept(tmp_path):
    blocks = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 40, "num_attention_heads": 4}
    path = tiny_gguf("qwen3_5_text", tmp_path / "x.gguf", 3, "Q8_0", **blocks, **HEADS_OF_16)[1]
    kept, exact = keep(path, tmp_path / "kept"), make_pack(path, tmp_path / "float", Codec.F32)
    assert kept.manifest.kept is not None
    assert {"0.qkv", "0.gate", "0.beta", "0.decay", "0.out", "2.gate"} <= set(kept.manifest.kept.matrices)
    assert not kept.manifest.kept.requantized
    results = []
    for packed, share in ((exact, 1.0), (kept, 0.3), (kept, 1.0)):
        with tiny_engine(packed, share, chunk=16) as engine:
            results.append(logits_of(engine, PROMPT[:29], PROMPT[29:45]))
    assert np.array_equal(results[1], results[2])
    assert np.sqrt(np.mean((results[1] - results[0]) ** 2) / np.mean(results[0] ** 2)) < 3e-2


def saved_of(engine: Engine, path: Path) -> bytes:
    text_of(engine, PROMPT[:1200], 20)
    engine.save(path)
    return path.read_bytes()


def test_a_flipped_bit_of_any_page_is_found(packed, tmp_path):
    with engine_of(packed) as engine:
        data = saved_of(engine, tmp_path / "saved")
        engine.resume(tmp_path / "saved")
        expected = text_of(engine, [*PROMPT[:1200], 7], 20, reuse=True)
        pages = HEAD.unpack_from(data)[2]
        for at in np.linspace(pages, len(data) - 1, 25, dtype=int).tolist():
            damaged = bytearray(data)
            damaged[at] ^= 4
            (tmp_path / "damaged").write_bytes(damaged)
            with pytest.raises(SessionError, match="damaged"):
                engine.resume(tmp_path / "damaged")
            assert (engine.sequence.length, engine.sequence.kv.marks()) == (0, ())
        engine.resume(tmp_path / "saved")
        assert text_of(engine, [*PROMPT[:1200], 7], 20, reuse=True) == expected


def forged(data: bytes, **changes: object) -> bytes:
    """The file with other statements in its header, and a checksum that is right."""
    magic, version, pages, json_bytes, _ = HEAD.unpack_from(data)
    body = json.loads(data[HEAD.size : HEAD.size + json_bytes]) | changes
    body = {name: value for name, value in body.items() if value != "missing"}
    text = json.dumps(body, separators=(",", ":")).encode()
    rest = text + data[HEAD.size + json_bytes : pages].rstrip(b"\0")
    rest = rest.ljust(-(-(HEAD.size + len(rest)) // 4096) * 4096 - HEAD.size, b"\0")
    checksum = _io.crc32(np.frombuffer(rest, np.uint8))
    return HEAD.pack(magic, version, HEAD.size + len(rest), len(text), checksum) + rest + data[pages:]


@pytest.mark.parametrize(
    "changes",
    [
        {"marks": [1024, 1183, 1190, 1191]},
        {"marks": [1183, 1024]},
        {"marks": [1024, 1024]},
        {"marks": [0, 1183]},
        {"marks": [1024, 4000]},
        {"marks": [1024.0, 1183]},
        {"marks": [True, 1183]},
        {"marks": None},
        {"marks": 5},
        {"marks": [1024]},
        {"marks": "missing"},
        {"ends": "missing"},
        {"ends": 1},
        {"ends": False},
    ],
)
def test_marks_that_no_sequence_has_are_refused(packed, tmp_path, changes):
    with engine_of(packed) as engine:
        data = saved_of(engine, tmp_path / "saved")
        assert forged(data) == data
        (tmp_path / "damaged").write_bytes(forged(data, **changes))
        with pytest.raises(SessionError, match="damaged"):
            engine.resume(tmp_path / "damaged")


def test_a_session_depends_neither_on_the_budget_nor_on_the_context(packed, tmp_path):
    files = []
    for share, chunk, context, draft in ((1.0, 256, CONTEXT, 1), (0.3, 16, 1300, 8)):
        with engine_of(packed, share, chunk=chunk, context=context, max_draft_tokens=draft) as engine:
            files.append(saved_of(engine, tmp_path / "saved"))
    assert files[0] == files[1]


NET = DeltaNet(key_heads=16, heads=32, key_dim=128, value_dim=128)
HEADS = Attention(16, 4, 256, 256**-0.5, Rope(1e7, dims=64), qk_norm=True, output_gate=True)
FFN = Ffn(9216, "silu")
SHAPE_4B = ModelSpec(
    "qwen3_5_text",
    vocab=248320,
    hidden=2560,
    layers=tuple(Layer(HEADS if i % 4 == 3 else NET, FFN) for i in range(32)),
    context=262144,
    tied=True,
)


def costs() -> FixedCosts:
    cpu = ops.load("cpu")
    own = NET.channels, NET.taps, NET.key_dim
    return FixedCosts(90 << 20, 90 << 20, KvCodec.BF16, lambda tokens, context: cpu.delta_rule_scratch_bytes(*own))


def test_keys_and_values_are_planned_for_the_layers_that_attend():
    layout = pack_layout(SHAPE_4B, Codec.INT4)
    attending = replace(SHAPE_4B, layers=(Layer(HEADS, FFN),) * 32)
    own = []
    for context in (4096, 65536):
        found = plan(SHAPE_4B, layout, 16 * GIB, Workload(context, prompt=512), costs())
        full = plan(attending, pack_layout(attending, Codec.INT4), 32 * GIB, Workload(context, prompt=512), costs())
        assert full.owners["KV"] == 4 * 8 * context * 2 * 4 * 256 * 2
        own.append(found.owners["KV"] - full.owners["KV"] // 4)
    assert own[0] == own[1] == 24 * RecurrentStore.claim(NET, None)  # whatever the context
    assert own[0] < 0.25 * GIB


def test_a_long_context_is_planned_under_8_gib():
    layout, workload = pack_layout(SHAPE_4B, Codec.INT4), Workload(262144, prompt=512)
    assert smallest_budget(SHAPE_4B, layout, workload, costs()) < 2 * GIB
    found = plan(SHAPE_4B, layout, 8 * GIB, workload, costs())
    assert sum(found.owners.values()) == 8 * GIB
    assert found.far is not None  # 8 GiB of keys and values: older ones lie on disk
    assert found.kv_disk_bytes < 8 * GIB


def test_what_is_not_built_for_recurrent_layers_is_named(packed, tmp_path):
    with pytest.raises(UnsupportedModelError, match="recurrent layers: use --mode exact"):
        method_for(packed, ops.load("cpu"))
    with pytest.raises(UnsupportedModelError, match="heads that are rotated in part cannot have labels"):
        labelled_layers(replace(SHAPE_4B, layers=SHAPE_4B.layers[:4]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"heads": 0}, "heads is 0"),
        ({"key_heads": 5}, "6 heads of a delta net do not share 5 key heads"),
        ({"taps": 9}, "a convolution of 9 taps"),
        ({"taps": True}, "taps is True"),
        ({"value_dim": 600}, "heads of 600 numbers"),
        ({"tiled": 1}, "tiled is 1"),
        ({"more": 1}, "unexpected keyword"),
    ],
)
def test_a_manifest_with_another_delta_net_is_refused(packed, tmp_path, change, reason):
    from flashrt.storage.manifest import Manifest, _checksum

    body = json.loads((packed.path / "manifest.json").read_bytes())
    body.pop("checksum")
    body["spec"]["layers"][0]["layer"]["delta_net"] |= change
    body["checksum"] = _checksum(body)
    with pytest.raises(PackError, match=reason):
        Manifest.from_bytes(json.dumps(body).encode(), "here")
