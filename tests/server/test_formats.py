"""Answers of a given form, over HTTP and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.cli.conftest import Cli, cache_home, check_failure, cli  # noqa: F401 - fixtures
from tests.server.conftest import Server, user

SCHEMA = {
    "type": "object",
    "properties": {"on": {"enum": ["the", "ring"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["on", "n"],
    "additionalProperties": False,
}


def ask(server: Server, form: dict[str, Any], **fields: Any) -> Any:
    create = server.client().chat.completions.create
    return create(model=server.name, messages=user("on"), response_format=form, max_tokens=200, **fields)


def schema(found: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": found, "strict": True}}


def test_a_schema_is_followed(server: Server) -> None:
    for seed in range(10):
        choice = ask(server, schema(SCHEMA), temperature=1.0, seed=seed, frequency_penalty=0.3).choices[0]
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    streamed = ask(server, schema(SCHEMA), temperature=1.0, seed=9, frequency_penalty=0.3, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == choice.message.content


def test_any_object(server: Server) -> None:
    choice = ask(server, {"type": "json_object"}, temperature=1.0, seed=1, logit_bias={"94": 20}).choices[0]
    assert choice.message.content.lstrip().startswith("{")
    assert ask(server, {"type": "text"}, seed=1).choices[0].message.content


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"type": "xml"}, "expected text, json_object or json_schema"),
        ({"type": "json_schema"}, "goes with the type"),
        ({"type": "json_object", "json_schema": {"name": "x", "schema": {}}}, "goes with the type"),
        (schema({"type": "pirate"}), "cannot be followed"),
        (schema({"$ref": "#/nowhere"}), "cannot be followed"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "schema"),
    ],
)
def test_what_cannot_be_followed_is_refused(server: Server, form: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as found:
        ask(server, form)
    assert found.value.param.startswith("response_format") or found.value.param == "schema"


def test_run_follows_a_schema(cli: Cli, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    options = ("-p", "on", "-n", 200, "--temperature", 1, "--seed", 4)
    texts = [
        cli("run", tiny, *options, "--json-schema", file, "--speculate", speculate).stdout for speculate in ("off", 8)
    ]
    jsonschema.validate(json.loads(texts[0]), SCHEMA)
    assert texts[1] == texts[0]
    check_failure(cli("run", tiny, *options, "--json-schema", file, "--ignore-eos"), 2, "--ignore-eos")
    file.write_text("no JSON")
    check_failure(cli("run", tiny, *options, "--json-schema", file), 2, "schema.json is no JSON")
    file.write_text("[]")
    check_failure(cli("run", tiny, *options, "--json-schema", file), 2, "holds no JSON schema")
