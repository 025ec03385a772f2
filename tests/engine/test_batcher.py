"""Requests that are computed together: the text of each is what it is alone, whoever is there and in whatever order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from flashrt.config import Sampling
from flashrt.engine.batcher import Batcher
from flashrt.engine.request import Request
from flashrt.errors import BudgetError, UsageError
from flashrt.model.ffn.dense import DenseBlock
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import FAMILIES, VOCAB, tiny_checkpoint

CONTEXT = 96
QUICK = ("gemma3", "qwen3_next", "deepseek_v3", "gemma4-inputs")
DRAWN = Sampling(temperature=0.9, top_p=0.95, presence_penalty=0.3)


def requests(count=13):
    """Prompts around the length from which rows are wide, some with a beginning in common, greedy and drawn."""
    random = np.random.default_rng(11)
    common = random.integers(3, VOCAB, 40).tolist()
    made = []
    for i in range(count):
        prompt = random.integers(3, VOCAB, (1, 15, 16, 17, 18, 33, 61)[i % 7]).tolist()
        prompt = common[: 10 * (i % 5)] + prompt if i % 3 == 0 else prompt
        limit = min(int(random.integers(1, 14)), CONTEXT - len(prompt[:80]))
        sampling = replace(DRAWN, seed=i) if i % 2 else Sampling()
        made.append(Request(prompt[:80], limit, sampling, stop_ids=frozenset({5, 6}) if i % 4 == 0 else frozenset()))
    return made


def alone(engine, request):
    generation = engine.generate(request.prompt, request.limit, request.sampling, ignore_eos=True)
    ids = []
    for token in generation:
        if token.id in request.stop_ids:
            break
        ids.append(token.id)
    generation.close()
    return ids[: request.limit]


def together(batcher, wanted):
    """Token ids and outcome of each request, in their order."""
    ids, outcomes = {id(r): [] for r in wanted}, {}
    for request in wanted:
        batcher.submit(request)
    while batcher.busy:
        for update in batcher.step():
            ids[id(update.request)] += [token.id for token in update.tokens]
            if update.finished is not None:
                assert id(update.request) not in outcomes, "a request is over once"
                outcomes[id(update.request)] = update.finished
    return [ids[id(r)] for r in wanted], [outcomes[id(r)] for r in wanted]


def batch_of(packed, wanted, sequences, share, **options):
    with tiny_engine(packed, share, context=CONTEXT, sequences=sequences, **options) as engine:
        batcher = Batcher(engine)
        assert batcher.places == sequences
        return together(batcher, wanted)


def packed_family(name, folder):
    _, checkpoint = tiny_checkpoint(name, folder / "checkpoint", seed=3)
    return make_pack(checkpoint, folder / "pack", Codec.INT4)


def check_family(name, folder):
    packed = packed_family(name, folder)
    wanted = requests()
    with tiny_engine(packed, 1.0, context=CONTEXT) as engine:
        expected = [alone(engine, request) for request in wanted]
    for sequences, share in ((1, 0.3), (3, 1.0), (5, 0.2), (24, 0.6)):
        found, outcomes = batch_of(packed, wanted, sequences, share)
        assert found == expected, f"{sequences} sequences, {share} of the weights"
        assert [o.new_tokens for o in outcomes] == [
            len(ids) + (o.finish_reason == "eos") for ids, o in zip(found, outcomes, strict=True)
        ]
    order = np.random.default_rng(1).permutation(len(wanted))
    found, _ = batch_of(packed, [wanted[i] for i in order], 4, 0.4)
    assert found == [expected[i] for i in order]


@pytest.mark.parametrize("name", [name for name in QUICK if name in FAMILIES])
def test_a_text_is_what_it_is_alone(name, tmp_path):
    check_family(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in QUICK])
def test_a_text_of_any_family_is_what_it_is_alone(name, tmp_path):
    check_family(name, tmp_path)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return packed_family("qwen2", tmp_path_factory.mktemp("batcher"))


def test_more_rows_than_a_narrow_call_has(packed):
    wanted = [replace(r, prompt=[*r.prompt[:5], 3 + i]) for i, r in enumerate(requests(45))]
    with tiny_engine(packed, 1.0, context=CONTEXT) as engine:
        expected = [alone(engine, request) for request in wanted]
    assert batch_of(packed, wanted, 45, 0.3)[0] == expected


def test_rows_of_both_kinds_share_passes(packed, monkeypatch):
    seen, mix = [], DenseBlock.mix

    def noted(self, x, y, wide):
        seen.append((wide, len(x)))
        mix(self, x, y, wide)

    monkeypatch.setattr(DenseBlock, "mix", noted)
    batch_of(packed, requests(), 4, 0.3)
    assert seen
    assert all(0 < wide < rows for wide, rows in seen)


def test_a_beginning_that_another_had_is_copied(packed):
    common = np.random.default_rng(2).integers(3, VOCAB, 50).tolist()
    wanted = [Request([*common, *range(3 + i, 23 + i)], 6, Sampling()) for i in range(6)]
    with tiny_engine(packed, 1.0, context=CONTEXT) as engine:
        expected = [alone(engine, request) for request in wanted]
    found, outcomes = batch_of(packed, wanted, 2, 0.5)
    assert found == expected
    assert [o.resumed_tokens for o in outcomes][2:] == [50] * 4


def test_a_request_that_nobody_wants_is_over(packed):
    gone = []
    first, second = requests(2)
    first = replace(first, limit=50, stop_ids=frozenset(), cancelled=lambda: bool(gone))
    with tiny_engine(packed, 1.0, context=CONTEXT, sequences=2) as engine:
        batcher = Batcher(engine)
        batcher.submit(first)
        batcher.submit(second)
        for _ in range(3):
            batcher.step()
        gone.append(True)
        updates = [update for update in batcher.step() if update.request is first]
        assert [update.finished.finish_reason for update in updates] == ["interrupted"]
        while batcher.busy:
            batcher.step()


def test_a_pass_that_is_interrupted_leaves_the_reads_in_order(packed, monkeypatch):
    wanted = requests()
    with tiny_engine(packed, 0.2, context=CONTEXT, sequences=3) as engine:
        expected = together(Batcher(engine), wanted)[0]
        batcher = Batcher(engine)
        for request in wanted:
            batcher.submit(request)
        batcher.step()
        with monkeypatch.context() as patched:
            patched.setattr(DenseBlock, "add", _interrupt)
            patched.setattr(DenseBlock, "mix", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                batcher.step()
        assert together(Batcher(engine), wanted)[0] == expected


def _interrupt(*arguments, **options):
    raise KeyboardInterrupt


def test_plans_with_drafts_are_refused(packed):
    with tiny_engine(packed, 0.5, context=CONTEXT, max_draft_tokens=4) as engine, pytest.raises(UsageError):
        Batcher(engine)


def test_sequences_are_counted(packed):
    with tiny_engine(packed, 1.0, context=CONTEXT) as one, tiny_engine(packed, 1.0, context=CONTEXT, sequences=7) as n:
        assert n.plan.owners["KV"] == 7 * one.plan.owners["KV"]
        assert n.plan.logit_rows == 7
        assert n.plan.prefill_chunk >= 7 + 16
    with pytest.raises(BudgetError):
        tiny_engine(packed, -0.9, context=CONTEXT, sequences=100)
