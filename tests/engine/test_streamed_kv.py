"""Engines whose older keys and values lie on disk: the texts of those that hold everything, and what can go wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flashrt.engine.build import build_engine, load_tokenizer
from flashrt.engine.engine import Engine
from flashrt.engine.runtime import runtime_for
from flashrt.errors import DiskError
from flashrt.kv.streamed import StreamedStore
from flashrt.model.schedule import Schedule
from flashrt.storage.pack import Pack
from flashrt.storage.reader import Reader
from flashrt.storage.scratch_file import ScratchFile
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine, tiny_plan
from tests.families import VOCAB, tiny_checkpoint

CONTEXT = 4000
PROMPT = np.random.default_rng(5).integers(3, VOCAB, 1150).tolist()


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def make(family: str, root: Path, codec: Codec = Codec.INT8) -> Pack:
    options = {"max_position_embeddings": 16384}
    _, checkpoint = tiny_checkpoint(family, root / "checkpoint", seed=3, **options)
    return make_pack(checkpoint, root / "pack", codec)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make("qwen2", tmp_path_factory.mktemp("streamed"))


def streaming(packed: Pack, share: float = 0.2, **options: object) -> Engine:
    engine = tiny_engine(packed, share, stream_kv=True, **{"context": CONTEXT, **options})
    assert engine.plan.far is not None
    assert any(isinstance(store, StreamedStore) for store in engine.sequence.kv.stores)
    return engine


def text_of(engine: Engine, prompt: list[int], new: int, **options: object) -> list[int]:
    generation = engine.generate(prompt, new, ignore_eos=True, **options)  # type: ignore[arg-type]
    list(generation)
    return generation.report.token_ids


FAMILIES = ["llama", "gemma3", "gemma4-inputs", "gpt_oss", "deepseek_v3"]
SLOW_FAMILIES = ["gemma2", "gemma4", "opt", "mixtral", "qwen3", "ministral3"]
CASES = [
    pytest.param(family, *options, marks=[] if family in FAMILIES and options == (0.3, 12) else pytest.mark.slow)
    for family in [*FAMILIES, *SLOW_FAMILIES]
    for options in ((0.1, 1), (0.3, 12))
]


@pytest.mark.parametrize(("family", "share", "draft"), CASES)
def test_texts_are_those_of_an_engine_that_holds_everything(family, share, draft, tmp_path):
    packed = make(family, tmp_path)
    assert packed.spec.context >= CONTEXT
    share = min(share, 0.1) if packed.spec.latent else share  # more would hold all of the little that these keep
    repeated = PROMPT[:50] * 20  # which drafts copy from
    with (
        tiny_engine(packed, 1.0, context=CONTEXT) as whole,
        streaming(packed, share, chunk=64, max_draft_tokens=draft) as far,
    ):
        assert far.plan.owners["KV"] < whole.plan.owners["KV"]
        for prompt, new in ((PROMPT, 300), (repeated, 200), (PROMPT[:5], 700)):
            assert text_of(far, prompt, new) == text_of(whole, prompt, new)
        assert far.sequence.kv.far(far.sequence.length, 1) > 0


def test_float32_and_a_conversation_that_is_cut_back(tmp_path):
    packed = make("llama", tmp_path, Codec.F32)
    with tiny_engine(packed, 1.0, context=CONTEXT) as whole, streaming(packed, 0.5, max_draft_tokens=4) as far:
        for keep in (1150, 1149, 700, 513, 512, 40):
            prompt = [*PROMPT[:keep], *PROMPT[20:90]]
            assert text_of(far, prompt, 30, reuse=True) == text_of(whole, prompt, 30, reuse=True)


def test_logits_of_every_pass_are_the_same(packed):
    with tiny_engine(packed, 1.0, context=CONTEXT) as whole, streaming(packed) as far:
        both = whole, far
        for length in (300, 530, 1150):
            found = [engine.runner.prefill(engine.sequence, PROMPT[:length]).copy() for engine in both]
            assert np.array_equal(*found)
        for token in PROMPT[:400:3]:
            found = [engine.runner.step(engine.sequence, token).copy() for engine in both]
            assert np.array_equal(*found)


def test_what_is_read_ahead_is_what_the_next_pass_takes(packed, monkeypatch):
    """Also where a segment leaves memory: then the next pass takes one page more."""
    abandoned = []
    with streaming(packed) as far:
        text_of(far, PROMPT, 5)
        monkeypatch.setattr(Schedule, "abandon", lambda schedule: abandoned.append(far.sequence.length))
        before = far.sequence.kv.far(far.sequence.length, 1)
        for token in PROMPT[:600]:
            far.runner.step(far.sequence, token)
        assert far.sequence.kv.far(far.sequence.length, 1) >= before + 2
        assert not abandoned
        monkeypatch.undo()


def test_scores_are_the_same(packed):
    with (
        tiny_engine(packed, 1.0, context=CONTEXT, scoring=True) as whole,
        streaming(packed, scoring=True, chunk=64) as far,
    ):
        for wide in (True, False):
            found = [engine.runner.score(engine.sequence, PROMPT, wide) for engine in (whole, far)]
            assert found[0] == pytest.approx(found[1], rel=1e-14)  # summed in passes of other lengths


def test_memory_beside_the_weights_holds_pages(packed):
    with tiny_engine(packed, 1.0, context=CONTEXT) as whole, streaming(packed, 1.6, context=16000) as far:
        assert far.plan.kv_held
        assert far.plan.kv_disk_bytes > 0
        assert text_of(far, PROMPT, 100) == text_of(whole, PROMPT, 100)


def test_sessions_go_on_with_either_kind_of_memory(packed, tmp_path):
    with tiny_engine(packed, 1.0, context=CONTEXT) as whole, streaming(packed) as far:
        expected = text_of(whole, PROMPT, 40)
        assert text_of(far, PROMPT, 40) == expected
        files = [tmp_path / "whole", tmp_path / "far"]
        for engine, file in zip((whole, far), files, strict=True):
            engine.save(file)
        assert files[0].read_bytes() == files[1].read_bytes()
        longer = [*PROMPT, *expected, 7, 8, 9]
        answers = []
        for engine, file in ((whole, files[1]), (far, files[0])):
            engine.resume(file)
            answers.append(text_of(engine, longer, 40, reuse=True))
        assert answers[0] == answers[1]


def test_what_was_read_ahead_of_another_text_is_not_attended_to(packed, tmp_path):
    """A session takes the place of a text that has as many pages."""
    other = PROMPT[::-1]
    with tiny_engine(packed, 1.0, context=CONTEXT) as whole, streaming(packed, max_draft_tokens=1) as far:
        answers = []
        for engine in (whole, far):
            first = text_of(engine, PROMPT, 40)
            engine.save(tmp_path / "session")
            text_of(engine, other, 40)
            engine.resume(tmp_path / "session")
            answers.append(engine.prefill([*PROMPT, *first]).copy())
        assert np.array_equal(*answers)


def test_reads_are_as_planned(packed):
    with streaming(packed, max_draft_tokens=1) as far:
        generation = far.generate((PROMPT * 4)[: CONTEXT - 200], None, ignore_eos=True)
        list(generation)
        assert far.plan.streamed_bytes_per_token >= far.plan.kv_disk_bytes > 0
        assert generation.report.bytes_read_per_token == pytest.approx(far.plan.streamed_bytes_per_token, rel=0.2)


def test_a_disk_without_room_is_named_before_anything_is_loaded(packed, monkeypatch, tmp_path):
    def full(handle: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskError, match=r"need 0.* GiB of disk in .*cache.* is free: make room.*--kv-dir"):
        streaming(packed)
    assert not list((tmp_path / "cache").rglob("flashrt-kv-*"))


def test_a_directory_that_cannot_be_written_to_is_named(packed, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    runtime = runtime_for("cpu", threads=2)
    plan = tiny_plan(packed, runtime, 0.2, CONTEXT, stream_kv=True)
    with pytest.raises(DiskError, match="cannot be made"):
        build_engine(packed, plan, load_tokenizer(packed), runtime, kv_dir=file / "inside")


def test_a_write_that_fails_keeps_the_text_so_far(packed, monkeypatch):
    with tiny_engine(packed, 1.0, context=CONTEXT) as whole, streaming(packed) as far:
        generation = far.generate(PROMPT[:560], 600, ignore_eos=True)
        before = [next(generation).id for _ in range(40)]
        with monkeypatch.context() as broken:
            broken.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
            with pytest.raises(DiskError, match=r"writing .*flashrt-kv-.* failed: I/O error"):
                before.extend(token.id for token in generation)
        assert generation.report.token_ids == before
        assert len(before) > 40
        expected = text_of(whole, PROMPT[:560], 600)
        assert before == expected[: len(before)]
        assert text_of(far, PROMPT[:560], 600) == expected


def test_a_read_that_fails_is_named_and_the_engine_goes_on(packed, monkeypatch):
    with tiny_engine(packed, 1.0, context=CONTEXT) as whole, streaming(packed) as far:
        generation = far.generate(PROMPT, 100, ignore_eos=True)
        next(generation)
        read_file = Reader.read_file

        def broken(reader: Reader, handle: int, direct: bool, offset: int, buffer: np.ndarray) -> object:
            closed = os.open("/dev/null", os.O_WRONLY)  # reading from it fails
            try:
                return read_file(reader, closed, False, offset, buffer)
            finally:
                reader.settle()
                os.close(closed)

        with monkeypatch.context() as patched:
            patched.setattr(Reader, "read_file", broken)
            with pytest.raises(DiskError, match=r"reading .*flashrt-kv-.* failed: Bad file descriptor"):
                list(generation)
        assert text_of(far, PROMPT, 100) == text_of(whole, PROMPT, 100)


def test_closing_leaves_no_descriptor_and_no_thread(packed):
    handles = len(os.listdir("/proc/self/fd"))
    threads = len(os.listdir("/proc/self/task"))
    far = streaming(packed)
    generation = far.generate(PROMPT, 100, ignore_eos=True)
    next(generation)
    far.close()
    assert generation.report.finish_reason == "interrupted"
    del far, generation
    assert len(os.listdir("/proc/self/fd")) == handles
    assert len(os.listdir("/proc/self/task")) <= threads + 1  # the kernels' own


def test_a_killed_process_leaves_no_file(tmp_path):
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from flashrt.storage.scratch_file import ScratchFile\n"
        "file = ScratchFile(Path(sys.argv[1]), 1 << 20)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_file_takes_its_room_at_once(tmp_path):
    file = ScratchFile(tmp_path, 3 << 20)
    assert os.fstat(file.handle).st_blocks * 512 >= 3 << 20
    assert os.fstat(file.handle).st_nlink == 0
    file.close()
    file.close()
