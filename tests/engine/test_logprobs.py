"""Log-probabilities of prompts and answers: those of the model, whatever is drafted or streamed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashrt.config import Sampling
from flashrt.errors import UsageError
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint

PROMPT = np.random.default_rng(5).integers(3, VOCAB, 40).tolist()
DRAWN = Sampling(temperature=0.8, seed=5, frequency_penalty=0.5, presence_penalty=0.2, logit_bias=((7, 3.0),))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("logprobs")
    model, checkpoint = tiny_checkpoint("llama", root / "checkpoint", seed=3)
    return model, make_pack(checkpoint, root / "pack", Codec.F32)


def of_transformers(model, ids):
    """float64 [len(ids), vocab]: of what follows each token."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1).numpy()


@pytest.mark.parametrize("length", [2, 9, 40])
@pytest.mark.parametrize("share", [0.4, 1.0])
def test_a_prompt_is_scored_as_transformers_does(case, length, share):
    model, packed = case
    expected = of_transformers(model, PROMPT[:length])
    with tiny_engine(packed, share, chunk=16, scoring=True) as engine:
        found = engine.prompt_logprobs(PROMPT[:length], top=4)
        assert len(found) == length - 1
        for i, noted in enumerate(found):
            assert noted.logprob == pytest.approx(expected[i, PROMPT[i + 1]], abs=1e-4)
            best = np.argsort(-expected[i])[:4]
            assert [token for token, _ in noted.top] == best.tolist()
            assert [value for _, value in noted.top] == pytest.approx(expected[i, best].tolist(), abs=1e-4)
        assert engine.prompt_logprobs(PROMPT[:length]) == [type(n)(n.logprob) for n in found]


def test_a_request_goes_on_from_a_scored_prompt(case):
    with tiny_engine(case[1], 1.0, chunk=16, scoring=True) as engine:
        plain = [token.id for token in engine.generate(PROMPT, 20, DRAWN, ignore_eos=True)]
        engine.prompt_logprobs(PROMPT)
        generation = engine.generate(PROMPT, 20, DRAWN, ignore_eos=True, reuse=True)
        assert [token.id for token in generation] == plain
        assert generation.report.resumed_tokens == len(PROMPT) - 17


@pytest.mark.parametrize("sampling", [Sampling(), DRAWN], ids=["greedy", "drawn"])
def test_an_answer_has_the_same_logprobs_with_drafts(case, sampling):
    model, packed = case
    prompt, found = [*PROMPT[:12], *PROMPT[:12]], []
    for share, positions in ((1.0, 1), (1.0, 12), (0.4, 6)):
        with tiny_engine(packed, share, chunk=16, max_draft_tokens=positions) as engine:
            plain = [token.id for token in engine.generate(prompt, 30, sampling, ignore_eos=True)]
            generation = engine.generate(prompt, 30, sampling, ignore_eos=True, top_logprobs=3)
            tokens = list(generation)
            assert [token.id for token in tokens] == plain
            found.append([(token.id, token.logprobs) for token in tokens])
    assert found[0] == found[1] == found[2]
    expected = of_transformers(model, prompt + [token for token, _ in found[0]])[len(prompt) - 1 :]
    for row, (token, noted) in zip(expected[:-1], found[0], strict=True):
        assert noted.logprob == pytest.approx(row[token], abs=1e-3)
        assert [value for _, value in noted.top] == pytest.approx(np.sort(row)[::-1][:3].tolist(), abs=1e-3)


def test_what_makes_no_sense_is_refused(case):
    with tiny_engine(case[1], 1.0, scoring=True) as engine:
        for top in (21, -1, True, 1.0):
            with pytest.raises(UsageError, match="top_logprobs"):
                engine.generate(PROMPT, 4, top_logprobs=top)
        with pytest.raises(UsageError, match="logit_bias"):
            engine.generate(PROMPT, 4, Sampling(logit_bias=((VOCAB, 1.0),)))
        with pytest.raises(UsageError, match="the context is 96"):
            engine.prompt_logprobs(PROMPT * 3)
    with tiny_engine(case[1], 1.0) as engine, pytest.raises(UsageError, match="planned for generating"):
        engine.prompt_logprobs(PROMPT)


def test_what_is_cancelled_ends_before_the_next_pass(case):
    """Of a prompt as of an answer; what was computed by then is used by the next request."""
    with tiny_engine(case[1], 0.4, chunk=16, scoring=True) as engine:
        plain = [token.id for token in engine.generate(PROMPT, 12, ignore_eos=True)]
        asked = iter([False, False, True])
        generation = engine.generate(PROMPT, 12, ignore_eos=True, cancelled=lambda: next(asked))
        assert list(generation) == []
        assert generation.report.finish_reason == "interrupted"
        assert engine.sequence.length == 32
        generation = engine.generate(PROMPT, 12, ignore_eos=True, reuse=True)
        assert [token.id for token in generation] == plain
        assert generation.report.resumed_tokens == len(PROMPT) - 17
        tokens: list[int] = []
        generation = engine.generate(PROMPT, 12, ignore_eos=True, cancelled=lambda: len(tokens) == 5)
        for token in generation:
            tokens.append(token.id)
        assert tokens == plain[:5]
        assert generation.report.new_tokens == 5
        passes = iter([False, True])
        assert len(engine.prompt_logprobs(PROMPT, cancelled=lambda: next(passes))) == 16
        assert [token.id for token in engine.generate(PROMPT, 12, ignore_eos=True)] == plain
