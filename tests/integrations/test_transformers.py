"""What transformers does with a model of its own, it does with an engine's."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    StoppingCriteriaList,
    TextIteratorStreamer,
    pipeline,
)

from flashrt.errors import UsageError
from flashrt.integrations.transformers import FlashrtForCausalLM
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import tiny_checkpoint

PROMPT = torch.tensor([[5, 9, 30, 41, 7, 66, 12]])


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(model of transformers, the engine's, tokenizer) with the same weights."""
    root = tmp_path_factory.mktemp("integration")
    reference, checkpoint = tiny_checkpoint("llama", root / "checkpoint", seed=3)
    packed = make_pack(checkpoint, root / "pack", Codec.F32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with tiny_engine(packed, 0.5, context=96, chunk=24) as engine:
        model = FlashrtForCausalLM(engine)
        reference.generation_config = model.generation_config
        yield reference.eval(), model, tokenizer


def both(pair, *inputs, **options):
    found = []
    for model in pair[:2]:
        torch.manual_seed(5)
        found.append(model.generate(*inputs, **options))
    return found


def assert_close(found, expected):
    assert found.shape == expected.shape
    error = (found - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert float(error) < 1e-4


@pytest.mark.parametrize("tokens", [1, 2, 17, 90])
def test_logits(pair, tokens):
    ids = torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    reference, model, _ = pair
    with torch.no_grad():
        expected = reference(ids).logits
    assert_close(model(ids).logits, expected)
    for keep in (1, 2, 500):
        assert_close(model(ids, logits_to_keep=keep).logits, expected[:, -keep:])


@pytest.mark.parametrize("left", [True, False])
def test_rows_are_padded_on_either_side(pair, left):
    reference, model, _ = pair
    ids = torch.randint(3, 90, (3, 20), generator=torch.Generator().manual_seed(1))
    lengths = [20, 7, 12]
    mask = torch.stack([torch.cat([torch.zeros(20 - n), torch.ones(n)]) for n in lengths]).long()
    mask = mask if left else mask.flip(1)
    found = model(ids, attention_mask=mask).logits
    for row, kept in enumerate(mask.bool()):
        with torch.no_grad():
            assert_close(found[row][kept], reference(ids[row][kept][None]).logits[0])
        assert not found[row][~kept].any()


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "top_p": 0.7, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
        {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
        {"do_sample": False, "output_scores": True, "return_dict_in_generate": True},
    ],
)
def test_generate(pair, options):
    expected, found = both(pair, PROMPT, max_new_tokens=12, **options)
    if options.get("return_dict_in_generate"):
        assert_close(torch.stack(found.scores), torch.stack(expected.scores))
        expected, found = expected.sequences, found.sequences
    assert found.tolist() == expected.tolist()


def test_generate_takes_what_transformers_takes(pair):
    config = GenerationConfig(max_new_tokens=30, do_sample=False, eos_token_id=2, pad_token_id=0)
    processors = LogitsProcessorList([MinLengthLogitsProcessor(20, 2)])
    criteria = StoppingCriteriaList([MaxLengthCriteria(19)])
    options = {"generation_config": config, "logits_processor": processors, "stopping_criteria": criteria}
    expected, found = both(pair, PROMPT, **options)
    assert found.tolist() == expected.tolist()
    assert found.shape == (1, 19)


def test_generate_of_a_padded_batch(pair):
    tokenizer = pair[2]
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    inputs = tokenizer(["the ring and on", "hello", "in the end of it"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    expected, found = both(pair, **inputs, max_new_tokens=8, do_sample=False)
    assert found.tolist() == expected.tolist()


def test_a_streamer_and_a_pipeline(pair):
    _, model, tokenizer = pair
    text = "the ring"
    inputs = tokenizer(text, return_tensors="pt")
    expected = model.generate(inputs.input_ids, max_new_tokens=8, do_sample=False)[0]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"max_new_tokens": 8, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, args=(inputs.input_ids,), kwargs=options)
    thread.start()
    streamed = "".join(streamer)
    thread.join(60)
    assert streamed == tokenizer.decode(expected[inputs.input_ids.shape[1] :])
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert made(text, max_new_tokens=8, do_sample=False)[0]["generated_text"].startswith(text)


def test_what_it_cannot_do_is_refused(pair):
    model = pair[1]
    with pytest.raises(ValueError, match="one run of ones here"):
        model(PROMPT, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(PROMPT, inputs_embeds=torch.zeros(1, 7, 4))
    with pytest.raises(UsageError, match="the context is 96"):
        model(torch.ones(1, 97, dtype=torch.long))
