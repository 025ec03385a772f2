"""A closed engine: its memory is free at once, whoever still holds what it made."""

from __future__ import annotations

import gc
import inspect
import signal
import weakref

import pytest

from flashrt.errors import UsageError
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import tiny_checkpoint

PROMPT = list(range(5, 25))


@pytest.fixture(params=["llama", "gemma3", "mixtral"])
def packed(request, tmp_path):
    _, checkpoint = tiny_checkpoint(request.param, tmp_path / "checkpoint", seed=3)
    return make_pack(checkpoint, tmp_path / "pack", Codec.INT8)


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_the_weights_go_with_the_engine(packed, share):
    gc.collect()
    gc.disable()  # no reference may be in a circle
    try:
        engine = tiny_engine(packed, share, chunk=16, max_draft_tokens=8)
        finished, left = engine.generate(PROMPT, 12), engine.generate(PROMPT, 12)
        list(finished)
        next(left)
        weights = weakref.ref(engine.runner.decoder.weights)
        engine.close()
        assert weights() is None
        assert finished.report.new_tokens == 12
        assert left.report.finish_reason == "interrupted"
    finally:
        gc.enable()


def test_a_signal_cannot_close_in_the_middle_of_a_token(packed):
    with tiny_engine(packed, 1.0) as engine:
        expected = [token.id for token in engine.generate(PROMPT, 12)]
        generation, errors = engine.generate(PROMPT, 12), []
        norm = engine.runner.decoder.work.ops.rms_norm

        def close(*_):
            try:
                engine.close()
            except UsageError as error:
                errors.append(str(error))

        class Struck:
            def __getattr__(self, name):
                return getattr(ops, name)

            def rms_norm(self, *arguments):
                if inspect.getgeneratorstate(generation._tokens) == inspect.GEN_RUNNING and not errors:
                    signal.raise_signal(signal.SIGUSR1)
                norm(*arguments)

        ops, previous = engine.runner.decoder.work.ops, signal.signal(signal.SIGUSR1, close)
        engine.runner.decoder.work.ops = Struck()
        try:
            assert [token.id for token in generation] == expected
        finally:
            signal.signal(signal.SIGUSR1, previous)
            engine.runner.decoder.work.ops = ops
        assert len(errors) == 1
        assert "being computed" in errors[0]
