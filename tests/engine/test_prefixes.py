"""A directory of sessions: the longest beginning whose tokens match, whatever else happens to the directory."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from flashrt.engine.engine import Engine
from flashrt.engine.prefixes import LOCK
from flashrt.engine.sessions import Sessions
from flashrt.errors import SessionError, SessionWarning, UsageError
from flashrt.storage.lock import lock
from flashrt.storage.pack import Pack
from tests.engine.test_sessions import DRAWN, FAMILIES, PROMPT, engine_of, packed_of

OTHER = np.random.default_rng(6).integers(3, 131, 400).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def packed(request, tmp_path_factory) -> Pack:
    return packed_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Pack:
    return packed_of("llama-yarn", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "sessions"


def keeping(packed: Pack, folder: Path, limit: int = 1 << 30, **options) -> Engine:
    engine = engine_of(packed, **options)
    engine.keep_sessions(folder, limit)
    return engine


def ask(engine: Engine, prompt: list[int], new: int = 12, **options) -> tuple[list[int], int]:
    """The text, and how many tokens of the prompt were not computed."""
    generation = engine.generate(prompt, new, DRAWN, ignore_eos=True, **options)
    list(generation)
    return generation.report.token_ids, generation.report.resumed_tokens


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.kv")}


@pytest.fixture(autouse=True)
def warn_of_nothing():
    """Unless a test says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", SessionWarning)
        yield


def test_a_later_process_begins_where_an_earlier_one_was(packed, folder):
    with engine_of(packed) as engine:
        expected = ask(engine, PROMPT)[0]
        conversation = [*PROMPT, *expected, *OTHER[:40]]
        ask(engine, PROMPT)
        follows = ask(engine, conversation, reuse=True)[0]
    with keeping(packed, folder) as engine:
        assert ask(engine, PROMPT) == (expected, 0)
    with keeping(packed, folder, chunk=16) as engine:
        assert ask(engine, PROMPT) == (expected, len(PROMPT) - 17)
        assert ask(engine, PROMPT) == (expected, len(PROMPT) - 17)
    with keeping(packed, folder, context=len(conversation) + 12) as engine:
        assert ask(engine, conversation, reuse=True) == (follows, len(PROMPT) + 11)


def test_texts_that_begin_alike_share_files(llama, folder):
    fork = [*PROMPT[:600], *OTHER]
    with engine_of(llama) as engine:
        expected = ask(engine, fork)[0]
    with keeping(llama, folder) as engine:
        ask(engine, PROMPT)
        before = files(folder)
        assert len(before) == 4
        assert ask(engine, fork) == (expected, 600)
        after = files(folder)
    assert len(after.keys() - before.keys()) == 2  # from 512 on
    assert after.items() >= before.items()


def test_what_a_longer_text_holds_is_not_held_twice(llama, folder):
    with keeping(llama, folder) as engine:
        answer, _ = ask(engine, PROMPT[:300])
        assert len(files(folder)) == 2
        ask(engine, [*PROMPT[:300], *answer, *OTHER])
        held = files(folder)
        assert len(held) == 3  # the end of the shorter one is in a file of the longer one
        ask(engine, [*PROMPT[:300], *answer])
    assert files(folder).items() >= held.items()


def test_a_window_goes_on_only_where_its_tokens_are(tmp_path, folder):
    """A longer text has lost what a shorter beginning needs; once that is computed again, it is kept beside."""
    packed = packed_of("gemma3", tmp_path)
    shorter = [*PROMPT[:500], *OTHER[:60]]
    with engine_of(packed) as engine:
        expected = ask(engine, shorter)[0]
        whole = ask(engine, PROMPT)[0]
    with keeping(packed, folder) as engine:
        ask(engine, PROMPT)
        assert ask(engine, shorter) == (expected, 0)
        assert ask(engine, shorter) == (expected, 543)
        assert ask(engine, PROMPT) == (whole, 914)


def test_names_alone_are_never_believed(llama, folder):
    """A file under the name of another, as if their hashes were equal."""
    with keeping(llama, folder) as engine:
        expected = ask(engine, PROMPT)[0]
        names = sorted(files(folder))
        ask(engine, OTHER)
        others = sorted(files(folder).keys() - names)
        first, other = (next(n for n in group if n.startswith(start)) for group, start in roots(names, others))
        os.replace(folder / other, folder / first)
        assert ask(engine, PROMPT) == (expected, 0)
        assert ask(engine, PROMPT) == (expected, 914)


def roots(*groups: list[str]) -> list[tuple[list[str], str]]:
    """With each group of names the start of those that begin a text."""
    starts = {name[:33] for name in groups[0]} & {name[:33] for name in groups[1]}
    assert len(starts) == 1
    return [(group, *starts) for group in groups]


@pytest.mark.parametrize("part", [0, 40, -1])
def test_what_is_damaged_is_named_and_removed(llama, folder, part):
    with keeping(llama, folder) as engine:
        expected = ask(engine, PROMPT)[0]
        held = files(folder)
        path = ordered(folder)[2]
        data = bytearray(path.read_bytes())
        data[part] ^= 1
        path.write_bytes(data)
        with pytest.warns(SessionWarning, match=f"{path.name} is (damaged|not a session).* computed again"):
            assert ask(engine, PROMPT) == (expected, 512)
        assert files(folder) == held
        assert ask(engine, PROMPT) == (expected, 914)


def ordered(folder: Path) -> list[Path]:
    """The files of one text, from its beginning on."""
    paths = list(folder.glob("*.kv"))
    after = {path.name[:32]: path for path in paths}
    ends = {path.stem[33:] for path in paths}
    chain = [next(path for path in paths if path.name[:32] not in ends)]
    while (key := chain[-1].stem[33:]) in after:
        chain.append(after[key])
    return chain


def test_what_cannot_be_removed_is_not_asked_again(llama, folder, monkeypatch):
    with keeping(llama, folder) as engine:
        expected = ask(engine, PROMPT)[0]
        path = ordered(folder)[1]
        path.write_bytes(path.read_bytes()[:-1])
        monkeypatch.setattr(Path, "unlink", refuse)
        with pytest.warns(SessionWarning, match="damaged"):
            assert ask(engine, PROMPT) == (expected, 256)


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(errno.EPERM, "Operation not permitted")


@pytest.mark.parametrize("vanishing", [0, 2])
@pytest.mark.parametrize("opened", [1, 2])
def test_a_file_that_vanishes_is_no_error(llama, folder, monkeypatch, vanishing, opened):
    """Before its tokens are compared, or between that and the reading of its pages."""
    with keeping(llama, folder) as engine:
        expected = ask(engine, PROMPT)[0]
        victim, times, plain_open = ordered(folder)[vanishing], [], Sessions.open

        def vanish(self, path):
            if path == victim:
                times.append(path)
                if len(times) == opened:
                    path.unlink()
            return plain_open(self, path)

        monkeypatch.setattr(Sessions, "open", vanish)
        assert ask(engine, PROMPT) == (expected, vanishing * 256)


def test_the_least_recently_used_goes_first(llama, folder):
    texts = [[number, *PROMPT[1:500]] for number in (11, 12, 13)]
    with keeping(llama, folder) as engine:
        ask(engine, texts[0])
        each = sum(files(folder).values())
    with keeping(llama, folder, limit=int(2.5 * each)) as engine:
        for i in (1, 0, 2):  # 1 is the oldest by the time that there is no room
            ask(engine, texts[i])
            assert sum(files(folder).values()) <= 2.5 * each
        assert [resumed(engine, text) for text in texts] == [483, 256, 483]  # its end went first


def resumed(engine: Engine, prompt: list[int]) -> int:
    """How many tokens the directory would give, asked without keeping anything."""
    generation = engine.generate(prompt, 1)
    next(generation)
    kept = generation._resumed
    engine.turns.end(generation)
    generation.close()
    return kept


def test_what_does_not_fit_is_kept_in_part(llama, folder):
    with keeping(llama, folder) as engine:
        expected = ask(engine, PROMPT)[0]
        sizes = [path.stat().st_size for path in ordered(folder)]
    for path in ordered(folder):
        path.unlink()
    with keeping(llama, folder, limit=sum(sizes[:2]) + 1) as engine:
        with pytest.warns(SessionWarning, match="in part"):
            ask(engine, PROMPT)
        assert sum(files(folder).values()) == sum(sizes[:2])
        with pytest.warns(SessionWarning, match="in part"):
            assert ask(engine, PROMPT) == (expected, 512)
    with keeping(llama, folder, limit=0) as engine, pytest.warns(SessionWarning, match="in part"):
        ask(engine, OTHER)
    assert not files(folder)


def test_a_full_disk_takes_nothing_from_the_text(llama, folder, monkeypatch):
    with keeping(llama, folder) as engine:
        expected = ask(engine, PROMPT[:300])[0]
        held = files(folder)

        def fail(*_):
            raise OSError(errno.ENOSPC, "full")

        with monkeypatch.context() as patched:
            patched.setattr(os, "posix_fallocate", fail)
            with pytest.warns(SessionWarning, match=r"not kept: the disk of .*sessions is full"):
                assert len(ask(engine, PROMPT)[0]) == 12
        assert files(folder) == held
        assert sorted(path.name for path in folder.iterdir()) == sorted([*held, LOCK])
        assert ask(engine, PROMPT[:300]) == (expected, 283)


def test_what_a_killed_process_left_is_removed(llama, folder):
    with keeping(llama, folder) as engine:
        (folder / "x.kv.1.2.tmp").write_bytes(b"half")
        ask(engine, PROMPT[:300])
        assert not list(folder.glob("*.tmp"))


def test_packs_and_forms_do_not_meet(llama, tmp_path, folder):
    other = packed_of("llama-yarn", tmp_path, seed=4)
    with keeping(llama, folder) as engine:
        ask(engine, PROMPT)
    with keeping(other, folder) as engine:
        assert ask(engine, PROMPT)[1] == 0


def test_a_part_is_no_session(llama, folder):
    with keeping(llama, folder) as engine:
        ask(engine, PROMPT)
        with pytest.raises(SessionError, match="a part of a session.*name that directory"):
            engine.resume(ordered(folder)[1])


def test_an_interrupted_answer_is_kept(llama, folder):
    with keeping(llama, folder) as engine:
        generation = engine.generate(PROMPT, 50, DRAWN, ignore_eos=True)
        first = [next(generation).id for _ in range(3)]
        generation.close()
        assert files(folder)
    with keeping(llama, folder) as engine:
        text, kept = ask(engine, PROMPT)
        assert (text[:3], kept) == (first, 914)


def test_who_saves_waits_for_who_does(llama, folder):
    with keeping(llama, folder) as engine:
        with lock(folder / LOCK, busy="taken"):
            pass
        ask(engine, PROMPT[:50])
        lock(folder / LOCK, busy="still held").close()


def test_a_folder_that_cannot_be_is_refused(llama, tmp_path):
    (tmp_path / "file").write_text("")
    with engine_of(llama) as engine, pytest.raises(UsageError, match="no sessions can be kept in .*file"):
        engine.keep_sessions(tmp_path / "file", 1 << 20)
