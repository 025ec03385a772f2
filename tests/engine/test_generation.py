"""What a request does: limits, stops, sampling, reports; and what an interrupt leaves behind."""

from __future__ import annotations

import random
import signal

import numpy as np
import pytest

from flashrt.config import Sampling
from flashrt.engine.engine import Engine
from flashrt.errors import PackError, UsageError
from flashrt_kernels.rows import Codec
from tests.distribution import distribution
from tests.engine.support import make_pack, relative_rms, tiny_engine
from tests.families import VOCAB, tiny_checkpoint

PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("generation")
    _, checkpoint = tiny_checkpoint("mixtral", root / "checkpoint", num_hidden_layers=6)
    return make_pack(checkpoint, root / "pack", Codec.INT8)


@pytest.fixture
def engine(packed):
    with tiny_engine(packed, 0.3, context=120) as engine:
        yield engine


def ids(engine: Engine, **options) -> list[int]:
    return [token.id for token in engine.generate(PROMPT, 24, ignore_eos=True, **options)]


def test_an_interrupt_at_any_moment_leaves_the_engine_usable(engine):
    expected = ids(engine)
    moments = random.Random(0)

    def strike(*_):
        raise KeyboardInterrupt

    struck = 0
    previous = signal.signal(signal.SIGALRM, strike)
    try:
        for attempt in range(60):
            generation = engine.generate(PROMPT + expected[: attempt % 9], 24, ignore_eos=True, reuse=True)
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-4 + 0.04 * moments.random())
                for _ in generation:
                    pass
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                struck += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            generation.close()
            assert generation.report.finish_reason in ("interrupted", "length")
            assert ids(engine) == expected
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert struck > 5


def test_a_second_request_reads_pinned_weights_no_more(engine):
    ids(engine)
    before = engine.reader.bytes_read
    generation = engine.generate(PROMPT, 4, ignore_eos=True)
    assert len(list(generation)) == 4
    assert engine.reader.bytes_read - before < 5 * engine.plan.weight_bytes
    assert generation.report.bytes_read_total > 0


def test_reuse_keeps_what_two_prompts_share(tmp_path):
    """In float32, where few and many tokens are computed alike, a conversation continues as if read afresh."""
    _, checkpoint = tiny_checkpoint("llama", tmp_path / "checkpoint")
    with tiny_engine(make_pack(checkpoint, tmp_path / "pack", Codec.F32), 0.3, context=120) as engine:
        longer = PROMPT + ids(engine) + [7, 8, 9]
        fresh = engine.runner.prefill(engine.sequence, [*longer[:-1], 11]).copy()
        engine.sequence.rewind(0)
        ids(engine)
        kept = engine.sequence.length
        assert kept > len(PROMPT)
        before = engine.reader.bytes_read
        continued = engine.runner.prefill(engine.sequence, [*longer[:-1], 11])
        assert relative_rms(continued, fresh) < 1e-5
        assert engine.reader.bytes_read - before < 2 * engine.plan.weight_bytes  # one short pass, not the prompt again


@pytest.mark.parametrize(
    ("shared", "length"),
    [(0, 9), (1, 9), (5, 14), (11, 14), (12, 14), (12, 12), (7, 7)],
    ids=["nothing", "one", "some", "all but one", "all", "the same prompt", "its beginning"],
)
def test_a_prompt_that_shares_its_beginning_gives_the_bits_of_a_fresh_one(engine, shared, length):
    """In narrow passes, whose bits do not depend on how many tokens are new."""
    earlier, later = PROMPT[:12], PROMPT[:shared] + [60 + i for i in range(length - shared)]
    fresh = engine.runner.prefill(engine.sequence, later).copy()
    engine.sequence.rewind(0)
    engine.runner.prefill(engine.sequence, earlier)
    assert np.array_equal(engine.runner.prefill(engine.sequence, later), fresh)
    assert engine.sequence.length == length
    engine.runner.prefill(engine.sequence, earlier)
    answers = [
        [token.id for token in engine.generate(later, 6, ignore_eos=True, reuse=reuse)] for reuse in (True, False)
    ]
    assert answers[0] == answers[1]


def test_report_adds_up(engine):
    before = engine.bytes_read
    generation = engine.generate(PROMPT, 10, ignore_eos=True)
    with pytest.raises(RuntimeError, match="not over"):
        _ = generation.report
    tokens = list(generation)
    report = generation.report
    assert report.token_ids == [t.id for t in tokens]
    assert report.text == "".join(t.text for t in tokens)
    assert (report.prompt_tokens, report.new_tokens, report.finish_reason) == (20, 10, "length")
    assert report.decode_tok_per_s == pytest.approx(9 / report.decode_s)
    assert 0 < report.io_wait_s + report.compute_s <= report.ttft_s + report.decode_s + 1e-3
    assert report.plan["budget_bytes"] == report.budget_bytes
    read_by_prefill = report.bytes_read_total - 9 * report.bytes_read_per_token
    assert read_by_prefill >= engine.plan.streamed_bytes_per_token > 0
    assert report.bytes_read_total <= engine.bytes_read - before


def test_same_seed_same_tokens(engine):
    sampling = Sampling(temperature=1.5, top_k=40, seed=11)
    assert ids(engine, sampling=sampling) == ids(engine, sampling=sampling)
    assert ids(engine, sampling=sampling) != ids(engine, sampling=Sampling(temperature=1.5, top_k=40, seed=12))


def test_repetition_penalty_forbids_repeats(engine):
    tokens = ids(engine, sampling=Sampling(repetition_penalty=100.0))
    assert len(set(tokens)) == len(tokens)
    assert not set(tokens) & set(PROMPT)


def test_stop_strings_end_the_text_before_them(engine):
    whole = engine.generate(PROMPT, 24, ignore_eos=True)
    list(whole)
    text = whole.report.text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    generation = engine.generate(PROMPT, 24, ignore_eos=True, stop=[stop, "never"])
    streamed = "".join(t.text for t in generation)
    assert streamed == generation.report.text == text[: text.index(stop)]
    assert generation.report.finish_reason == "stop"


@pytest.mark.parametrize("turn", [1, -1])
def test_of_two_stop_strings_the_one_that_begins_first_ends_the_text(engine, turn):
    """The later one is the end of the earlier one, so that both are complete with the same token."""
    whole = engine.generate(PROMPT, 24, ignore_eos=True)
    list(whole)
    text = whole.report.text
    at = next(i for i in range(3, len(text)) if text.index(text[i + 1 : i + 4]) == i + 1)
    stops = [text[at : at + 4], text[at + 1 : at + 4]]
    generation = engine.generate(PROMPT, 24, ignore_eos=True, stop=stops[::turn])
    assert "".join(t.text for t in generation) == generation.report.text == text[:at]
    assert generation.report.finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "limit", "message"),
    [
        ([], 4, "prompt is empty"),
        ([VOCAB], 4, "token ids outside 0 to 130"),
        ([-1], 4, "token ids outside 0 to 130"),
        ([5] * 120, 4, "the context is 120"),
        ([5] * 100, 40, "do not fit in the context"),
        ([5], 0, "max_new_tokens is 0"),
    ],
)
def test_requests_that_cannot_be_served(engine, prompt, limit, message):
    with pytest.raises(UsageError, match=message):
        engine.generate(prompt, limit)


def test_batches_are_bounded(engine):
    engine.runner.prefill(engine.sequence, PROMPT)
    with pytest.raises(UsageError, match="expected 1 to 1"):
        engine.runner.step_batch(engine.sequence, [5, 6])


def test_distribution_against_a_plain_computation():
    logits = np.random.default_rng(3).normal(size=50).astype(np.float32) * 3
    tokens, probabilities = distribution(logits, Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02))
    order = sorted(range(50), key=lambda i: -logits[i])[:20]
    weights = np.exp(logits[order].astype(float) / 0.7)
    weights /= weights.sum()
    kept, total = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if kept and (total >= 0.9 or weight < 0.02 * weights[0]):
            break
        kept.append(token)
        total += weight
    assert tokens.tolist() == kept
    assert np.allclose(probabilities, weights[: len(kept)] / weights[: len(kept)].sum())


@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_sampling_refuses_nonsense(field):
    for value in (float("nan"), -1.0, 1e9):
        with pytest.raises(UsageError, match=field):
            Sampling(**{field: value})


def test_prefill_gives_the_last_token_s_logits_whatever_a_pass_may_hold(packed):
    with tiny_engine(packed, 1.0, logit_rows=16) as wide, tiny_engine(packed, 1.0) as narrow:
        for prompt in (PROMPT[:5], PROMPT):
            assert np.array_equal(
                wide.runner.prefill(wide.sequence, prompt), narrow.runner.prefill(narrow.sequence, prompt)
            )
            wide.sequence.rewind(0)
            narrow.sequence.rewind(0)


def test_one_generation_at_a_time(engine):
    expected = ids(engine)
    first = engine.generate(PROMPT, 24, ignore_eos=True)
    second = engine.generate(PROMPT, 24, ignore_eos=True)
    next(first)
    assert [t.id for t in second] == expected
    with pytest.raises(UsageError, match="another generation has begun"):
        next(first)


def test_a_closed_engine_says_so(packed):
    with tiny_engine(packed, 0.3) as engine:
        generation = engine.generate(PROMPT, 24, ignore_eos=True)
        next(generation)
        unused = engine.generate(PROMPT, 4)
    assert generation.report.new_tokens >= 1
    assert generation.report.finish_reason == "interrupted"
    for call in (
        lambda: next(unused),
        lambda: engine.runner.step(engine.sequence, 5),
        lambda: engine.runner.prefill(engine.sequence, [5]),
    ):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_a_failed_read_leaves_the_engine_usable(engine, monkeypatch):
    expected = ids(engine)
    engine.runner.prefill(engine.sequence, PROMPT)
    with monkeypatch.context() as patch:
        patch.setattr(engine.reader.pack, "block_crc", lambda *_: 0)
        for flags in engine.reader._verified.values():
            flags[:] = bytes(len(flags))
        with pytest.raises(PackError, match="does not match its checksum"):
            ids(engine)
    assert ids(engine) == expected


def test_scoring_needs_a_plan_for_it_and_known_tokens(packed, engine):
    with pytest.raises(UsageError, match="planned for generating"):
        engine.score(PROMPT, 16)
    with tiny_engine(packed, 1.0, scoring=True) as scorer, pytest.raises(UsageError, match="token ids outside"):
        scorer.score([5, VOCAB, 7], 16)


def test_expectations_do_not_pile_up_when_everything_is_resident(packed):
    with tiny_engine(packed, 1.0) as engine:
        ids(engine)
        assert not engine.runner.decoder.weights.ring._wanted


def test_logits_for_those_who_choose_themselves(packed):
    with tiny_engine(packed, 0.5) as engine:
        written = ids(engine)
        logits = engine.prefill(PROMPT)
        assert logits.shape == (engine.spec.vocab,)
        assert int(logits.argmax()) == written[0]
        assert int(engine.prefill([*PROMPT, *written[:3]]).argmax()) == written[3]
        for wrong in ([], [1.5], "text", [engine.spec.vocab], [3] * engine.plan.context):
            with pytest.raises(UsageError):
                engine.prefill(wrong)
