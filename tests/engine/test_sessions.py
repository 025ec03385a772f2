"""A sequence that is saved and resumed goes on as if the process had never ended; what is damaged is refused."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import flashrt
from flashrt.config import Sampling
from flashrt.engine.engine import Engine
from flashrt.engine.runtime import CpuRuntime
from flashrt.errors import DiskError, SessionError, UsageError
from flashrt.kv.cache import KINDS
from flashrt.kv.choice import SparseKv
from flashrt.kv.contiguous import ContiguousStore
from flashrt.kv.recurrent import RecurrentStore
from flashrt.storage import _io
from flashrt.storage.pack import Pack
from flashrt.storage.reader import Reader
from flashrt.storage.session_file import VERSION
from flashrt_kernels.rows import Codec
from tests.engine.support import TorchRuntime, make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint
from tests.kv.support import spec_labels

CONTEXT = 1400
FAMILIES = {  # windows that have slid by the end of the prompt, and those that have not
    "llama-yarn": (Codec.INT8, {}),
    "gemma3": (Codec.INT8, {"sliding_window": 40}),
    "mistral": (Codec.F32, {"sliding_window": 13}),
    "qwen2-window": (Codec.INT4, {"sliding_window": 300}),
    "qwen3_moe": (Codec.BF16, {}),
    "qwen3_5_text": (Codec.INT8, {}),
    "deepseek_v3": (Codec.INT4, {}),
    "gpt_oss": (Codec.BF16, {"sliding_window": 40}),
}
PROMPT = np.random.default_rng(5).integers(3, VOCAB, 931).tolist()
DRAWN = Sampling(temperature=1.0, seed=7)
PAGES = 7  # of the session that is damaged
HEAD = struct.Struct("<16s4I")


def packed_of(family: str, root: Path, seed: int = 3) -> Pack:
    codec, options = FAMILIES[family]
    _, checkpoint = tiny_checkpoint(family, root / "checkpoint", seed, max_position_embeddings=4096, **options)
    return make_pack(checkpoint, root / "pack", codec)


@pytest.fixture(scope="module", params=FAMILIES)
def packed(request, tmp_path_factory) -> Pack:
    return packed_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Pack:
    return packed_of("gemma3", tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def engine(gemma):
    with engine_of(gemma) as made:
        yield made


@pytest.fixture(scope="module")
def saved(engine, tmp_path_factory) -> tuple[bytes, list[int]]:
    """A session's file, and the text that follows a prompt that goes on from it."""
    path = tmp_path_factory.mktemp("saved") / "session"
    text_of(engine, PROMPT, 20)
    engine.save(path)
    engine.resume(path)
    return path.read_bytes(), text_of(engine, [*PROMPT, 7], 20, reuse=True)


def engine_of(packed: Pack, kinds=KINDS, **options) -> Engine:
    return tiny_engine(packed, 1.0, CpuRuntime(2, kinds), **{"context": CONTEXT, "max_draft_tokens": 8} | options)


def text_of(engine: Engine, prompt: list[int], new: int, **options) -> list[int]:
    """Tokens drawn by a seed, so that a difference in any logits shows."""
    generation = engine.generate(prompt, new, DRAWN, ignore_eos=True, **options)
    list(generation)
    return generation.report.token_ids


@pytest.mark.parametrize("cut", [0, 1, 60, 112, 113, 700])
def test_a_resumed_sequence_goes_on_as_the_one_that_was_saved(packed, tmp_path, cut):
    """Whatever holds it: more context and longer passes, or a store for all positions where there was one for some."""
    with engine_of(packed, chunk=64) as engine:
        text_of(engine, PROMPT, 20)
        engine.save(tmp_path / "saved")
        tokens, top = list(engine.sequence.tokens), engine.sequence.kv.top
        longer = [*tokens[: len(tokens) - cut], 7, 8, 9, 10]
        generation = engine.generate(longer, 30, DRAWN, ignore_eos=True, reuse=True)
        list(generation)
        expected, resumed = generation.report.token_ids, generation.report.resumed_tokens
        bits = engine.runner.prefill(engine.sequence, [*longer, 5]).copy()
    for kinds, context, chunk in (
        (KINDS, CONTEXT, 64),
        ((ContiguousStore, RecurrentStore), CONTEXT + 300, 16),
        (KINDS, 4096, 512),
    ):
        with engine_of(packed, kinds, context=context, chunk=chunk) as engine:
            assert engine.resume(tmp_path / "saved") is None
            assert engine.sequence.tokens == tokens
            assert (engine.sequence.length, engine.sequence.kv.top) == (len(tokens), top)
            generation = engine.generate(longer, 30, DRAWN, ignore_eos=True, reuse=True)
            list(generation)
            assert generation.report.token_ids == expected
            assert generation.report.resumed_tokens == resumed
            assert np.array_equal(engine.runner.prefill(engine.sequence, [*longer, 5]), bits)


def test_what_sparse_attention_computed_is_no_exact_session(tmp_path):
    """Nor the other way round, nor that of another share: the tokens that follow would be none of theirs."""
    packed = packed_of("llama-yarn", tmp_path)
    labels = spec_labels(packed.spec)
    kinds = {name: keep and SparseKv.of(labels, keep) for name, keep in (("all", None), ("8", 1 / 8), ("16", 1 / 16))}
    for name, kv in kinds.items():
        with engine_of(packed, kv=kv) as engine:
            engine.keep_sessions(tmp_path / "directory", 1 << 30)
            generation = engine.generate(PROMPT, 20, DRAWN, ignore_eos=True)
            list(generation)
            assert generation.report.resumed_tokens == 0
            engine.save(tmp_path / name)
            for other in kinds.keys() - {name}:
                if (tmp_path / other).exists():
                    with pytest.raises(SessionError, match="use the --kv, --kv-keep and labels that it was saved with"):
                        engine.resume(tmp_path / other)
    with engine_of(packed, kv=SparseKv.of(spec_labels(packed.spec), 1 / 16)) as engine:  # calibrated to the same again
        engine.resume(tmp_path / "16")


def test_a_rotation_that_depends_on_the_context_binds_a_session_to_it(tmp_path):
    options = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 8.0}}
    _, checkpoint = tiny_checkpoint("llama", tmp_path / "checkpoint", 3, max_position_embeddings=400, **options)
    packed = make_pack(checkpoint, tmp_path / "pack", Codec.INT8)
    for context, same, other in ((1000, 1000, 1001), (300, 400, 401)):
        with engine_of(packed, context=context) as engine:
            text_of(engine, PROMPT[:250], 20)
            engine.save(tmp_path / "saved")
        with engine_of(packed, context=same) as engine:
            engine.resume(tmp_path / "saved")
        with engine_of(packed, context=other) as engine, pytest.raises(SessionError, match="use the --context"):
            engine.resume(tmp_path / "saved")


def test_a_sequence_is_saved_again_after_it_was_resumed_and_cut_back(packed, tmp_path):
    """A file holds what may be gone on from, wherever the sequence had been before."""
    with engine_of(packed) as engine:
        text_of(engine, PROMPT, 20)
        assert engine.sequence.rewind(914) == 914  # 17 tokens before the end of the prompt
        engine.save(tmp_path / "first")
        engine.resume(tmp_path / "first")
        engine.save(tmp_path / "second")
        assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
        bits = engine.runner.prefill(engine.sequence, PROMPT[:845]).copy()
        assert engine.sequence.kv.top > 914 or engine.sequence.kv.recurrent  # these began again
        engine.resume(tmp_path / "second")
        assert np.array_equal(engine.runner.prefill(engine.sequence, PROMPT[:845]), bits)


@pytest.mark.parametrize("shared", [0, 5, 16, 300, 845, 931])
def test_the_text_of_a_prompt_is_the_same_with_a_session_and_without(packed, tmp_path, shared):
    prompt = [*PROMPT[:shared], *([9, 8, 7] * 300)][: max(shared, 400)]
    with engine_of(packed) as engine:
        expected = text_of(engine, prompt, 30)
        text_of(engine, PROMPT, 20)
        engine.save(tmp_path / "saved")
    with engine_of(packed, context=len(prompt) + 30) as engine:  # which has no room for the whole session
        engine.resume(tmp_path / "saved", prompt)
        assert engine.sequence.length in (min(shared, len(prompt) - 17), 0)
        assert engine.sequence.length or shared < 931  # a window may have lost what comes before
        assert text_of(engine, prompt, 30, reuse=True) == expected


def test_messages_come_back(engine, tmp_path):
    messages = [{"role": "user", "content": 'naïve "\n'}, {"role": "assistant", "content": ""}]
    text_of(engine, PROMPT[:20], 3)
    engine.save(tmp_path / "saved", messages)
    assert engine.resume(tmp_path / "saved") == messages


def test_memory_of_a_resumed_session_is_that_of_the_plan(engine, tmp_path, monkeypatch):
    """Pages pass through memory that the engine has anyway, many of them at a time."""
    text_of(engine, PROMPT, 20)
    staging, seen = engine.reader.staging, []
    read = Reader.read_file
    monkeypatch.setattr(Reader, "read_file", lambda *arguments: seen.append(arguments[4]) or read(*arguments))
    engine.save(tmp_path / "saved")
    engine.resume(tmp_path / "saved")
    assert len(seen) == PAGES
    assert all(np.shares_memory(buffer, staging) for buffer in seen)
    assert all(buffer.ctypes.data % 4096 == 0 == buffer.nbytes % 4096 for buffer in seen)
    assert not any(np.shares_memory(before, after) for before, after in itertools.pairwise(seen))


def refused(engine: Engine, path: Path, match: str, saved: tuple[bytes, list[int]]) -> None:
    """Refused by name; nothing of it is attended to, and the engine goes on."""
    with pytest.raises(SessionError, match=match) as error:
        engine.resume(path)
    assert str(path) in str(error.value)
    path.write_bytes(saved[0])
    engine.resume(path)
    assert text_of(engine, [*PROMPT, 7], 20, reuse=True) == saved[1]


def header_end(data: bytes) -> int:
    _, _, _, json_bytes, _ = HEAD.unpack_from(data)
    body = json.loads(data[HEAD.size : HEAD.size + json_bytes])
    return HEAD.size + json_bytes + 4 * body["length"]


def flips(data: bytes) -> list[int]:
    """A byte of every part, and some anywhere."""
    _, _, _, json_bytes, _ = HEAD.unpack_from(data)
    checksums = header_end(data)
    parts = [0, 16, 20, 24, 28, 32, 36, HEAD.size + json_bytes - 1, HEAD.size + json_bytes, checksums - 1, checksums]
    random = np.random.default_rng(1).integers(0, len(data), 20).tolist()
    return [*parts, checksums + 90, -(-checksums // 4096) * 4096 + 4096, len(data) // 2, len(data) - 1, *random]


def test_a_flipped_bit_is_found_wherever_it_is(engine, saved, tmp_path):
    data, expected = saved
    path = tmp_path / "session"
    text_of(engine, PROMPT[:50], 3)
    before = engine.sequence.length
    for at in flips(data):
        damaged = bytearray(data)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(SessionError, match="damaged|not a session|version"):
            engine.resume(path)
        assert engine.sequence.length in (0, before)  # its own still, or nothing
        assert len(engine.sequence.tokens) == engine.sequence.length
    path.write_bytes(data)
    engine.resume(path)
    assert text_of(engine, [*PROMPT, 7], 20, reuse=True) == expected


@pytest.mark.parametrize("size", [0, 1, 31, 32, 100, 4095, 4096, 8192, -8192, -4096, -1])
def test_a_truncated_file_is_refused(engine, saved, tmp_path, size):
    (tmp_path / "session").write_bytes(saved[0][:size])
    refused(engine, tmp_path / "session", "damaged|not a session", saved)


@pytest.mark.parametrize("extra", [b"x", bytes(4096)])
def test_a_longer_file_is_refused(engine, saved, tmp_path, extra):
    (tmp_path / "session").write_bytes(saved[0] + extra)
    refused(engine, tmp_path / "session", "damaged", saved)


def forged(data: bytes, version: int = VERSION, **changes: object) -> bytes:
    """The file with other statements in its header, and a checksum that is right."""
    _, _, _, json_bytes, _ = HEAD.unpack_from(data)
    body = json.loads(data[HEAD.size : HEAD.size + json_bytes]) | changes
    text = json.dumps(body, separators=(",", ":")).encode()
    pages = HEAD.unpack_from(data)[2]  # where they begin
    rest = text + data[HEAD.size + json_bytes : header_end(data) + 4 * PAGES]
    rest = rest.ljust(-(-(HEAD.size + len(rest)) // 4096) * 4096 - HEAD.size, b"\0")
    checksum = _io.crc32(np.frombuffer(rest, np.uint8))
    return HEAD.pack(data[:16], version, HEAD.size + len(rest), len(text), checksum) + rest + data[pages:]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": VERSION + 1}, f"version {VERSION + 1}, this flashrt reads version {VERSION}"),
        ({"pack": "0" * 64}, "saved with another pack"),
        ({"pack": None}, "saved with another pack"),
        ({"kv": {"item": "f32", "layers": []}}, "another form"),
        ({"length": 1 << 60, "top": 1 << 60}, "damaged"),
        ({"length": -1}, "damaged"),
        ({"length": 0}, "damaged"),
        ({"length": True}, "damaged"),
        ({"length": 900.0}, "damaged"),
        ({"length": 4096, "top": 4096}, "damaged"),
        ({"top": 0}, "damaged"),
        ({"top": None}, "damaged"),
        ({"begin": -256}, "damaged"),
        ({"begin": 255}, "damaged"),
        ({"messages": "text"}, "damaged"),
        ({"messages": [{"role": "user"}]}, "damaged"),
        ({"messages": [{"role": "user", "content": 5}]}, "damaged"),
    ],
)
def test_a_header_that_lies_is_refused(engine, saved, tmp_path, changes, match):
    (tmp_path / "session").write_bytes(forged(saved[0], **changes))
    refused(engine, tmp_path / "session", match, saved)


def test_what_a_header_says_is_large_is_bounded_before_it_is_read(engine, saved, tmp_path):
    path = tmp_path / "session"
    for nbytes, json_bytes in ((0xFFFFF000, 100), (8192, 0xFFFFFFFF), (0, 0)):
        path.write_bytes(HEAD.pack(saved[0][:16], VERSION, nbytes, json_bytes, 0) + saved[0][HEAD.size :])
        os.truncate(path, 1 << 40)  # sparse
        with pytest.raises(SessionError, match=f"its header would have {nbytes}"):
            engine.resume(path)


@pytest.mark.parametrize("family", ["gemma3", "llama-yarn"])
def test_a_session_of_another_pack_is_refused(engine, saved, tmp_path, family):
    (tmp_path / "session").write_bytes(saved[0])
    with engine_of(packed_of(family, tmp_path, seed=4)) as other, pytest.raises(SessionError, match="another pack"):
        other.resume(tmp_path / "session")


def test_what_is_no_file_is_refused(engine, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # never waited for
    for name, match in (("missing", "does not exist"), ("", "no file"), ("pipe", "no file"), ("a\0b", "cannot be")):
        with pytest.raises(SessionError, match=match):
            engine.resume(tmp_path / name)
    for wrong in (5, "", b"x"):
        with pytest.raises(UsageError, match="expected a path"):
            engine.resume(wrong)


def test_a_context_that_is_too_short_is_named(gemma, saved, tmp_path):
    (tmp_path / "session").write_bytes(saved[0])
    with engine_of(gemma, context=500) as short:
        with pytest.raises(UsageError, match=r"has 950 tokens, the context is 500: use a --context of 951"):
            short.resume(tmp_path / "session")
        assert len(text_of(short, PROMPT[:300], 5)) == 5


def test_a_read_error_leaves_an_empty_engine(engine, saved, tmp_path, monkeypatch):
    (tmp_path / "session").write_bytes(saved[0])
    read, calls = Reader.read_file, []

    def failing(reader, handle, direct, *rest):
        calls.append(rest)
        return read(reader, os.open("/proc/self/mem", os.O_RDONLY) if len(calls) == 5 else handle, False, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Reader, "read_file", failing)
        with pytest.raises(DiskError, match=r"session at byte \d+ failed: Input/output error"):
            engine.resume(tmp_path / "session")
    assert (engine.sequence.length, engine.sequence.tokens) == (0, [])
    assert {store.first for store in engine.sequence.kv.stores} == {0}
    engine.resume(tmp_path / "session")
    assert text_of(engine, [*PROMPT, 7], 20, reuse=True) == saved[1]


@pytest.mark.parametrize("failure", [errno.ENOSPC, errno.EIO, None])
@pytest.mark.parametrize("where", ["posix_fallocate", "fsync", "replace"])
def test_a_save_that_fails_leaves_what_was_there(engine, tmp_path, monkeypatch, failure, where):
    path = tmp_path / "session"
    path.write_bytes(b"the old one")
    text_of(engine, PROMPT[:300], 5)

    def fail(*_):
        raise KeyboardInterrupt if failure is None else OSError(failure, os.strerror(failure))

    with monkeypatch.context() as patched:
        patched.setattr(os, where, fail)
        with pytest.raises(KeyboardInterrupt if failure is None else DiskError, match="is full|failed|^$"):
            engine.save(path)
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [("session", b"the old one")]
    engine.save(path)
    engine.resume(path)


def test_a_process_that_is_killed_while_it_saves(gemma, engine, tmp_path):
    """The old file stays, and what was written of the new one is removed by who saves next."""
    path = tmp_path / "session"
    text_of(engine, PROMPT[:300], 5)
    engine.save(path)
    before = path.read_bytes()
    program = f"""
import os, signal
import flashrt
from flashrt.storage import _io
crc32, calls = _io.crc32, []
def deadly(data):
    calls.append(data)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return crc32(data)
_io.crc32 = deadly
with flashrt.load({str(gemma.path)!r}, context=500, cache_dir={str(tmp_path / "cache")!r}) as engine:
    list(engine.generate(list(range(3, 120)) * 3, 3))
    engine.save({str(path)!r})
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert len(list(tmp_path.glob("session.*"))) == 1
    engine.save(path)
    assert list(tmp_path.glob("session.*")) == []
    engine.resume(path)


def test_who_saves_while_another_does_leaves_a_whole_file(gemma, engine, tmp_path, monkeypatch):
    path, crc32 = tmp_path / "session", _io.crc32
    calls: list[threading.Thread] = []
    with engine_of(gemma) as other, monkeypatch.context() as patched:
        text_of(engine, PROMPT[:300], 5)
        text_of(other, PROMPT[300:700], 5)
        second = threading.Thread(target=other.save, args=(path,))

        def meanwhile(data):
            calls.append(threading.current_thread())
            if len(calls) == 4:  # some pages are written
                second.start()
                second.join()
                assert other.resume(path) is None
                assert other.sequence.tokens[:400] == PROMPT[300:700]
            return crc32(data)

        patched.setattr(_io, "crc32", meanwhile)
        engine.save(path)
    engine.resume(path)
    assert second in calls
    assert engine.sequence.tokens[:300] == PROMPT[:300]
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_saved_where_nothing_is(gemma, tmp_path):
    with engine_of(gemma) as engine:
        with pytest.raises(UsageError, match="nothing to save"):
            engine.save(tmp_path / "session")
        text_of(engine, PROMPT[:20], 3)
        with pytest.raises(DiskError, match="No such file"):
            engine.save(tmp_path / "nowhere" / "session")
        engine.save(tmp_path / "session")
    for call in (engine.save, engine.resume):
        with pytest.raises(UsageError, match="engine is closed"):
            call(tmp_path / "session")
    with tiny_engine(gemma, 1.0, TorchRuntime()) as engine, pytest.raises(UsageError, match="from the CPU only"):
        engine.resume(tmp_path / "session")


def test_load_resumes(gemma, saved, tmp_path):
    path = tmp_path / "session"
    path.write_bytes(saved[0])
    options = {"context": CONTEXT, "cache_dir": tmp_path / "cache", "speculate": "off"}
    with flashrt.load(gemma.path, session=path, **options) as engine:
        assert text_of(engine, [*PROMPT, 7], 20, reuse=True) == saved[1]
    path.write_bytes(saved[0][:-1])
    with pytest.raises(SessionError, match="damaged"):
        flashrt.load(gemma.path, session=path, **options)
