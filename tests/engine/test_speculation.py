"""Drafts change how fast text comes, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from flashrt.cache.adaptive import AdaptiveNeurons
from flashrt.config import Sampling
from flashrt.engine.drafters import CheckpointModel
from flashrt.errors import UsageError
from flashrt.model.ffn.adaptive import AdaptiveBlock
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import FAMILIES, VOCAB, tiny_checkpoint

# Wide enough for blocks of which some stream; the neurons of a group divide their number.
WIDE = {
    "llama": {"intermediate_size": 1100},
    "opt": {"ffn_dim": 900},
    "gemma3": {"intermediate_size": 1024},
    "qwen2": {"intermediate_size": 1001},
}
NEW = 48
SAMPLINGS = (Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=5), Sampling(repetition_penalty=1.3))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(pack, prompt) of one family; the prompt repeats itself, so that there is something to look up."""
    root = tmp_path_factory.mktemp(request.param)
    _, checkpoint = tiny_checkpoint(request.param, root / "checkpoint", seed=3)
    prompt = np.random.default_rng(7).integers(3, VOCAB, 11).tolist()
    return make_pack(checkpoint, root / "pack", Codec.INT4), [*prompt, *prompt, prompt[0]]


def written(engine, prompt, sampling, **options):
    generation = engine.generate(prompt, NEW, sampling, ignore_eos=True, **options)
    assert list(generation)
    assert generation.report.new_tokens == NEW
    return generation.report.token_ids, generation.report


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "drawn", "penalised"])
def test_text_is_the_same_under_every_budget(case, sampling):
    packed, prompt = case
    with tiny_engine(packed, 1.0, chunk=16) as engine:
        expected, report = written(engine, prompt, sampling)
    assert report.tokens_per_pass == 1
    assert report.acceptance is None
    for share, positions in ((0.3, 12), (0.7, 5), (0.9, 16), (1.0, 16)):
        with tiny_engine(packed, share, chunk=16, max_draft_tokens=positions) as engine:
            for _ in range(2):  # the second time with other neurons resident
                tokens, report = written(engine, prompt, sampling)
                assert tokens == expected
            for rows in adaptive(engine):
                rows.check_integrity()
        assert 1 <= report.tokens_per_pass <= report.positions_per_pass <= positions


@pytest.fixture(scope="module", params=WIDE)
def wide_case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    _, checkpoint = tiny_checkpoint(request.param, root / "checkpoint", seed=3, **WIDE[request.param])
    return make_pack(checkpoint, root / "pack", Codec.INT4), np.random.default_rng(7).integers(3, VOCAB, 40).tolist()


@pytest.mark.parametrize("prompt_tokens", [3, 40])  # computed as few tokens, and as many
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "drawn", "penalised"])
def test_resident_neurons_follow_the_text_and_change_nothing(wide_case, sampling, prompt_tokens):
    packed, prompt = wide_case
    prompt = prompt[:prompt_tokens]
    with tiny_engine(packed, 1.0, chunk=16) as engine:
        expected, _ = written(engine, prompt, sampling)
    moved = 0
    for share, positions in ((0.4, 12), (0.5, 4), (0.65, 16)):
        with tiny_engine(packed, share, chunk=16, max_draft_tokens=positions) as engine:
            assert engine.plan.drafts
            followed = adaptive(engine)
            before = [set(residents(rows).tolist()) for rows in followed]
            for _ in range(2):
                assert written(engine, prompt, sampling)[0] == expected
                for rows in followed:
                    rows.check_integrity()
                    assert holds_what_is_on_disk(packed, rows)
            moved += sum(set(residents(rows).tolist()) != own for rows, own in zip(followed, before, strict=True))
    assert moved


def test_any_share_may_be_resident(wide_case):
    """Also so little that only some layers have neurons in memory, or none, or the head streams."""
    packed, prompt = wide_case
    with tiny_engine(packed, 1.0, chunk=16) as engine:
        expected, _ = written(engine, prompt, Sampling())
    drafted = set()
    for share in np.arange(0.05, 0.8, 0.05):
        with tiny_engine(packed, float(share), chunk=16, max_draft_tokens=8) as engine:
            assert written(engine, prompt, Sampling())[0] == expected
            drafted.add(bool(engine.plan.drafts))
    assert drafted == {False, True}


def test_one_generation_ends_where_another_begins(wide_case):
    """Tokens of a pass that are not handed out yet are not handed out then."""
    packed, prompt = wide_case
    with tiny_engine(packed, 1.0, chunk=16, max_draft_tokens=16) as engine:
        first = engine.generate(prompt * 2, 8, Sampling(), ignore_eos=True)
        next(first)
        next(first)
        next(engine.generate(prompt, 4, Sampling()))
        with pytest.raises(UsageError, match="another generation has begun"):
            next(first)


def adaptive(engine):
    """The neurons of every block that adapts."""
    return [block.adaptive for block in engine.runner.decoder.ffns.blocks if isinstance(block, AdaptiveBlock)]


def residents(rows):
    """The neurons in memory, in the order of their slots."""
    return rows.neurons_in(np.arange(rows.resident))


def holds_what_is_on_disk(packed, rows):
    with open(packed.path / rows.tensor.file, "rb") as file:
        file.seek(rows.tensor.offset)
        disk = np.frombuffer(file.read(rows.tensor.nbytes), np.uint8).reshape(-1, rows.tensor.stride)
    return np.array_equal(rows.memory[: rows.resident], disk[residents(rows)])


def test_an_interrupted_pass_leaves_the_engine_fit(wide_case):
    """Wherever it is struck: reads are forgotten, neurons stay where they are, and the next text is right."""
    packed, prompt = wide_case
    with tiny_engine(packed, 1.0, chunk=16) as engine:
        expected, _ = written(engine, prompt, Sampling())
    with tiny_engine(packed, 0.5, chunk=16, max_draft_tokens=8) as engine:
        glu, calls = engine.runner.decoder.work.ops.glu, 0

        class Struck:
            def __getattr__(self, name):
                return self.glu if name == "glu" else getattr(ops, name)

            def glu(self, *args, **options):
                nonlocal calls
                calls += 1
                if calls % 17 == 0:
                    raise KeyboardInterrupt
                glu(*args, **options)

        ops = engine.runner.decoder.work.ops
        for _ in range(8):
            engine.runner.decoder.work.ops = Struck()
            with pytest.raises(KeyboardInterrupt):
                written(engine, prompt, Sampling())
            engine.runner.decoder.work.ops = ops
            assert written(engine, prompt, Sampling())[0] == expected
            for rows in adaptive(engine):
                rows.check_integrity()


@pytest.mark.parametrize("step", ["_fill", "_set_slots"])
def test_an_interrupted_move_leaves_the_engine_fit(wide_case, monkeypatch, step):
    """Struck after memory was overwritten, when the index does not say so yet or only half of it."""
    packed, prompt = wide_case
    with tiny_engine(packed, 1.0, chunk=16) as engine:
        expected, _ = written(engine, prompt, Sampling())
    complete = getattr(AdaptiveNeurons, step)
    with tiny_engine(packed, 0.5, chunk=16, max_draft_tokens=8) as engine:
        ring = engine.runner.decoder.weights.ring
        flush = ring.flush

        def flush_and_overwrite():
            flush()
            ring.memory[:] = 77  # a buffer that was given back holds nothing that one may count on

        monkeypatch.setattr(ring, "flush", flush_and_overwrite)
        for strike in (1, 2, 5):
            calls = 0

            def interrupted(self, *args, strike=strike):
                nonlocal calls
                calls += 1
                groups = self._group_in.copy()
                complete(self, *args)
                if calls == strike:
                    self._group_in[:] = groups  # as between the two halves of `_fill`
                    raise KeyboardInterrupt

            for rows in adaptive(engine):  # has others move in
                usage = np.full(rows.neurons, 1000, np.float32)
                usage[residents(rows)] = 0
                rows.learn(0, usage, 1000)
            other = np.random.default_rng(strike).integers(3, VOCAB, 40).tolist()
            with monkeypatch.context() as patch:
                patch.setattr(AdaptiveNeurons, step, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    written(engine, other, Sampling())
            for rows in adaptive(engine):
                rows.check_integrity()
                assert holds_what_is_on_disk(packed, rows)
            assert written(engine, prompt, Sampling())[0] == expected


def test_a_draft_leaves_the_sequence_alone_and_resembles_it(wide_case):
    packed, prompt = wide_case
    with tiny_engine(packed, 0.65, chunk=16, max_draft_tokens=6) as engine:
        logits = engine.runner.prefill(engine.sequence, prompt)
        token = int(logits.argmax())
        drafted = engine.runner.draft(engine.sequence, token, 0).copy()
        exact = engine.runner.step(engine.sequence, token).copy()
        assert engine.sequence.length == len(prompt) + 1
        assert np.corrcoef(drafted, exact)[0, 1] > 0.3


def test_a_checkpoint_drafts_what_it_would_say_itself(case):
    """Whatever was drafted before, and whichever of it stood."""
    packed, prompt = case
    with tiny_engine(packed, 1.0, chunk=16) as engine, tiny_engine(packed, 1.0, chunk=16) as other:
        model = CheckpointModel(engine.runner, engine.sequence)
        model.follow(prompt)
        assert np.array_equal(model.draft(prompt[-1], 0), other.runner.prefill(other.sequence, prompt))
        for depth, token in enumerate((5, 9), start=1):
            assert np.array_equal(model.draft(token, depth), other.runner.step(other.sequence, token))
        model.follow([5, 11])  # the first stood, the second did not
        assert np.array_equal(model.draft(11, 0), other.runner.prefill(other.sequence, [*prompt, 5, 11]))
        model.follow(range(3, 3 + engine.plan.context - len(prompt) - 2))
        assert model.draft(4, 0) is not None
        assert model.draft(4, 1) is None
