"""Answers of a given form: every one valid, whatever is drawn, drafted or streamed."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest

from flashrt.config import Sampling
from flashrt.engine.build import load_tokenizer
from flashrt.engine.grammar import Grammars
from flashrt.errors import UsageError
from flashrt_kernels.rows import Codec
from tests.engine.support import make_pack, tiny_engine
from tests.families import VOCAB, tiny_checkpoint

PROMPT = np.random.default_rng(5).integers(3, VOCAB, 20).tolist()
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "maximum": 99, "minimum": 0}, "on": {"enum": ["the", "ring"]}},
    "required": ["x", "on"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("grammar")
    _, checkpoint = tiny_checkpoint("llama", root / "checkpoint", seed=3)
    return make_pack(checkpoint, root / "pack", Codec.F32)


@pytest.fixture(scope="module")
def grammars(packed):
    return Grammars(load_tokenizer(packed), VOCAB, packed.spec.eos)


def a_schema(generator: random.Random, depth: int = 0) -> dict[str, Any]:
    kind = generator.randrange(7 if depth < 2 else 5)
    if kind == 5:
        return {"type": "array", "items": a_schema(generator, depth + 1), "maxItems": 2}
    if kind == 6:
        names = generator.sample(["a", "the", "ring", "x y"], generator.randrange(1, 4))
        properties = {name: a_schema(generator, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    return [
        {"type": "integer", "minimum": 0, "maximum": generator.randrange(1, 500)},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["in", "on", 5, None]},
        {"type": "string", "maxLength": 4},
    ][kind]


def test_answers_are_valid(packed, grammars):
    generator = random.Random(2)
    with tiny_engine(packed, 1.0, context=256) as engine:
        for i in range(40):
            schema = {"type": "object", "properties": {"it": a_schema(generator)}, "required": ["it"]}
            schema["additionalProperties"] = False
            grammar = grammars.json_schema(schema)
            generation = engine.generate(PROMPT, 220, Sampling(temperature=1.0, top_p=0.9, seed=i), grammar=grammar)
            list(generation)
            if generation.report.finish_reason == "eos":
                jsonschema.validate(json.loads(generation.report.text), schema)
            else:
                assert generation.report.finish_reason == "length"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=5)], ids=["greedy", "drawn"])
def test_drafts_and_budgets_change_nothing(packed, grammars, sampling):
    grammar, found = grammars.json_schema(POINT), []
    for share, positions in ((1.0, 1), (1.0, 12), (0.4, 6)):
        with tiny_engine(packed, share, context=256, max_draft_tokens=positions) as engine:
            for _ in range(2):
                generation = engine.generate(PROMPT, 200, sampling, grammar=grammar)
                list(generation)
                found.append((generation.report.text, generation.report.token_ids))
    assert found == found[:1] * 6
    jsonschema.validate(json.loads(found[0][0]), POINT)


def test_logprobs_are_those_without_a_grammar(packed, grammars):
    with tiny_engine(packed, 1.0) as engine:
        free = next(engine.generate(PROMPT, 1, top_logprobs=2)).logprobs
        bound = next(engine.generate(PROMPT, 1, top_logprobs=2, grammar=grammars.json_object())).logprobs
    assert bound.top == free.top
    assert bound.logprob < free.logprob


def test_what_cannot_be_followed_is_refused(packed, grammars):
    for schema in ({"type": "pirate"}, {"$ref": "#/nowhere"}, {"type": "object", "properties": 5}):
        with pytest.raises(UsageError, match="cannot be followed"):
            grammars.json_schema(schema)
    with pytest.raises(UsageError, match="characters"):
        grammars.json_schema({"enum": ["x" * (1 << 18)]})
    with pytest.raises(UsageError, match="no token that ends"):
        Grammars(load_tokenizer(packed), VOCAB, ())
    with tiny_engine(packed, 1.0) as engine, pytest.raises(UsageError, match="ignore_eos"):
        engine.generate(PROMPT, 5, grammar=grammars.json_object(), ignore_eos=True)
