"""What is asked is checked before anything is opened, or computed."""

from __future__ import annotations

import math

import numpy as np
import pytest

import flashrt
from flashrt.config import MOST_THREADS, Sampling
from flashrt.engine import open as loader
from flashrt.engine.options import LoadOptions
from flashrt.errors import UsageError
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import tiny_checkpoint

WRONG = [
    ("budget_gb", "1"),
    ("budget_gb", math.nan),
    ("budget_gb", math.inf),
    ("budget_gb", True),
    ("budget_gb", -1),
    ("budget_gb", [1]),
    ("host_budget_gb", 1.0),  # on the CPU
    ("context", "4096"),
    ("context", 96.0),
    ("context", 0),
    ("context", False),
    ("dtype", "int5"),
    ("dtype", Codec.INT8),
    ("dtype", None),
    ("cache_dir", 5),
    ("cache_dir", b"/tmp"),
    ("cache_dir", ""),
    ("threads", 0),
    ("threads", 10**9),
    ("threads", 1.5),
    ("threads", "2"),
    ("device", "tpu"),
    ("device", None),
    ("mode", "dense"),
    ("max_loss", 0.02),  # in exact mode
    ("speculate", 2.5),
    ("speculate", True),
    ("speculate", None),
    ("speculate", 17),
    ("speculate", "9" * 5000),
    ("draft", 3),
    ("session", 3),
    ("session", ""),
    ("session_dir", b"/tmp"),
    ("session_gb", 1.0),  # without a directory
    ("session_gb", "1"),
    ("session_gb", -1.0),
    ("session_gb", math.nan),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_option_is_refused_before_anything_is_opened(name, value, monkeypatch):
    monkeypatch.setattr(loader, "open_model", lambda *_: pytest.fail("opened"))
    with pytest.raises(UsageError, match="expected|host budget|--max-loss|--session-gb"):
        flashrt.load("anything", **{name: value})


@pytest.mark.parametrize("value", [0, -0.1, 1.5, "0.02", math.nan, True])
def test_a_loss_that_is_none_is_refused(value):
    with pytest.raises(UsageError, match="the loss allowed is"):
        LoadOptions(mode="sparse", max_loss=value)


@pytest.mark.parametrize("path", [5, None, b"demo", "", ["demo"]])
def test_a_model_that_is_no_path_is_refused(path):
    with pytest.raises(UsageError, match="the model is .*expected a path"):
        flashrt.load(path)


def test_contradictions_are_refused():
    with pytest.raises(UsageError, match="leave --speculate off out"):
        LoadOptions(draft="small", speculate="off")
    with pytest.raises(UsageError, match="on the CPU only"):
        LoadOptions(draft="small", device="cuda")
    for dtype in ("int8", "int4"):
        with pytest.raises(UsageError, match=f"--max-loss bounds no loss of --kv-dtype {dtype}"):
            LoadOptions(mode="sparse", max_loss=0.02, kv_dtype=dtype)
    LoadOptions(mode="sparse", max_loss=0.02, kv_dtype="bf16")


def test_options_are_keyword_only_and_frozen():
    with pytest.raises(TypeError):
        LoadOptions(1.0)  # type: ignore[misc]
    with pytest.raises(AttributeError):
        LoadOptions().threads = 2  # type: ignore[misc]


def test_numbers_of_numpy_are_numbers():
    options = LoadOptions(
        budget_gb=np.float32(1.5), context=np.int64(96), threads=np.uint8(2), speculate=np.int32(4), max_loss=None
    )
    assert (options.budget, options.max_draft_tokens) == (3 << 29, 4)
    assert LoadOptions(threads=MOST_THREADS, speculate="16").max_draft_tokens == 16


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    root = tmp_path_factory.mktemp("options")
    _, checkpoint = tiny_checkpoint("llama", root / "checkpoint")
    with tiny_engine(make_pack(checkpoint, root / "pack", Codec.INT8), 1.0, scoring=True) as engine:
        yield engine


@pytest.fixture
def idle(engine, monkeypatch):
    """An engine that fails when anything runs."""
    monkeypatch.setattr(engine.runner.decoder, "forward", lambda *_, **__: pytest.fail("ran"))
    return engine


@pytest.mark.parametrize(
    "prompt",
    [
        ["a", "b"],
        b"abc",
        bytearray(b"abc"),
        [1.5],
        [True],
        [-1],
        [10**6],
        [None],
        [[1, 2]],
        np.ones((2, 3), np.int64),
        np.ones(3),
        5,
        None,
        {1: 2},
    ],
)
def test_a_wrong_prompt_is_refused(idle, prompt):
    with pytest.raises(UsageError, match="token id"):
        idle.generate(prompt)
    with pytest.raises(UsageError, match="token id"):
        idle.score(prompt, 16)


@pytest.mark.parametrize(
    "asked",
    [
        {"max_new_tokens": 2.5},
        {"max_new_tokens": "2"},
        {"max_new_tokens": True},
        {"max_new_tokens": 0},
        {"stop": None},
        {"stop": [1]},
        {"stop": 5},
        {"stop": b"x"},
        {"stop": ""},
        {"stop": ["x", ""]},
        {"sampling": {}},
        {"sampling": 0.7},
        {"ignore_eos": "no"},
        {"reuse": 1},
    ],
)
def test_a_wrong_request_is_refused(idle, asked):
    (name,) = asked
    with pytest.raises(UsageError, match=f"(a )?{name}( text)? is "):
        idle.generate([5, 6], **({"max_new_tokens": 4} | asked))


@pytest.mark.parametrize("window", [16.0, "16", 1, True, 10**9])
def test_a_wrong_window_is_refused(idle, window):
    with pytest.raises(UsageError, match="the window is"):
        idle.score([5, 6, 7], window)


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": "1"},
        {"temperature": math.nan},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_p": None},
        {"min_p": [0.1]},
        {"repetition_penalty": 0},
        {"seed": 1.0},
        {"seed": -1},
    ],
)
def test_a_wrong_sampling_is_refused(asked):
    (name,) = asked
    with pytest.raises(UsageError, match=f"{name} is "):
        Sampling(**asked)


def test_ids_of_numpy_are_ids(engine):
    def generated(prompt, new):
        return [token.id for token in engine.generate(prompt, new, ignore_eos=True)]

    expected = generated([5, 6, 7], 4)
    assert generated(np.array([5, 6, 7]), np.int64(4)) == expected
    assert generated((np.uint8(5), 6, np.int32(7)), 4) == expected
