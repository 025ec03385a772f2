"""What a request asks for, once it was read: by the model's texts, its limits and what its authors recommend.

Nothing here or in what reads the routes' fields needs a server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

from flashrt.config import Sampling
from flashrt.engine.grammar import Grammars
from flashrt.engine.loaded_pack import LoadedPack
from flashrt.engine.recommended import recommended
from flashrt.errors import UsageError
from flashrt.server import fields as request_fields
from flashrt.server.answers import Usage
from flashrt.server.errors import ApiError, invalid
from flashrt.server.job import Event, Part, Rules
from flashrt.server.memory import RESULT_BYTES, most_prompt_tokens, result_bytes
from flashrt.server.prompts import Prompts
from flashrt.text.template import ChatTemplate

Chunk = dict[str, Any]


class Answers(Protocol):
    """Events of a job as the chunks of a stream, and these as one object."""

    named: bool  # whether each event of a stream has the name of its type, and nothing marks the end
    usage: Usage

    def first(self) -> Iterator[Chunk]:
        """Chunks before any event."""

    def chunks(self, event: Event) -> Iterator[Chunk]:
        """What an event comes to."""

    def last(self) -> Chunk:
        """The chunk that holds the usage."""

    def collect(self, chunk: Chunk) -> None:
        """Keep a chunk for `whole`."""

    def whole(self) -> Chunk:
        """The answer that the chunks are."""


@dataclass(frozen=True)
class Asked:
    """A request that was read and found in order."""

    parts: list[Part]
    rules: Rules
    answers: Answers
    stream: bool
    include_usage: bool


@dataclass
class Desk:
    """`name` is the model's own; `recommended` says how its authors would choose tokens, beside what is given."""

    name: str
    prompts: Prompts
    recommended: Callable[[dict[str, Any]], dict[str, Any]]
    grammars: Grammars | None  # None: nothing ends a text of this model

    def sampling(self, fields: request_fields.Fields) -> Sampling:
        """Raises ApiError."""
        found = request_fields.sampling(fields, self.recommended)
        for token, _ in found.logit_bias:
            if token >= self.prompts.vocab:
                raise invalid("logit_bias", f"logit_bias has {token}, the model knows 0 to {self.prompts.vocab - 1}")
        return found

    def seeded(self, sampling: Sampling, choices: int) -> Iterator[Sampling]:
        """One for each answer: the first with the seed itself, each other with one more."""
        for index in range(choices):
            yield sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + index)

    def check_size(self, parts: list[Part], top_logprobs: int | None) -> None:
        """Refuse what takes more memory to hold or to say than the plan has for it. Raises ApiError."""
        most = most_prompt_tokens(self.prompts.context)
        if sum(len(prompt) for prompt in {id(part.prompt): part.prompt for part in parts}.values()) > most:
            what = f"the prompts have more than {most} tokens together: ask with several requests"
            raise ApiError(400, what, param="prompt", code="too_large")
        if result_bytes(parts, top_logprobs) > RESULT_BYTES:
            raise ApiError(
                400,
                f"the answers may take more than {RESULT_BYTES >> 20} MiB to write: ask for fewer tokens, answers, "
                "prompts or top_logprobs at a time",
                code="too_large",
            )


def desk_of(model: LoadedPack) -> Desk:
    """That of an open pack. Raises PackError for recommendations without sense."""
    tokenizer, generation = model.tokenizer, model.tokenizer.text.generation
    recommended(generation, {})  # what is refused is refused now
    return Desk(
        name=model.pack.manifest.name,
        prompts=Prompts(tokenizer, template_of(model), model.spec.vocab, model.context),
        recommended=lambda given: recommended(generation, given),
        grammars=grammars_of(model),
    )


def grammars_of(model: LoadedPack) -> Grammars | None:
    """Made before the process is measured."""
    return Grammars(model.tokenizer, model.spec.vocab, model.spec.eos) if model.spec.eos else None


def template_of(model: LoadedPack) -> ChatTemplate | None:
    """That of the model. Raises CheckpointError for one that cannot be used."""
    try:
        template = model.tokenizer.chat_template
    except UsageError:  # a base model
        return None
    template.check()
    return template
