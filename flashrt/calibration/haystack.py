"""Synthetic texts to find something in: many lines of one form, and questions about some of them.

After LongChat's line retrieval and the key-value retrieval of Liu et al. 2023 (arXiv:2307.03172).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from flashrt.errors import CheckpointError, UsageError
from flashrt.text.tokenizer import Tokenizer

WORDS = (  # of which two name a line
    "amber anchor apple arrow autumn badge bamboo basil beacon birch blanket bottle brass bridge bronze butter "
    "cabin candle canyon carbon castle cedar cherry chimney cinder clover cobalt copper coral cotton crystal curtain "
    "daisy desert diamond dragon eagle ember engine falcon feather fern flint forest fountain fox galaxy garden "
    "garnet ginger glacier granite harbor hazel helmet hollow honey indigo iron island ivory jasmine jungle juniper "
    "kettle lagoon lantern laurel lemon lilac linen lizard lotus magnet mango maple marble meadow mirror mosaic "
    "needle nickel oak ocean olive onyx orange orchid otter oyster panther paper pebble pepper piano pilot planet "
    "plum pocket prairie quartz rabbit raven ribbon river rocket saddle saffron salmon sapphire shadow silver "
    "spider spruce summit tiger timber tulip turtle valley velvet violet walnut willow window winter zebra"
)
HEX_DIGITS = 16
DOTS = " ."  # what makes up for missing tokens
PLACEHOLDER = "@@message@@"

Draw = Callable[[random.Random], Iterator[tuple[str, str]]]  # distinct keys, and their values


def _registers(choice: random.Random) -> Iterator[tuple[str, str]]:
    words = WORDS.split()
    count = len(words)
    for pair in choice.sample(range(count * count), count * count):
        yield f"{words[pair // count]}-{words[pair % count]}", str(choice.randrange(10_000, 100_000))


def _hex_pairs(choice: random.Random) -> Iterator[tuple[str, str]]:
    seen = set()
    while True:
        key, value = (f"{choice.getrandbits(4 * HEX_DIGITS):0{HEX_DIGITS}x}" for _ in range(2))
        if key not in seen:
            seen.add(key)
            yield key, value


@dataclass(frozen=True, slots=True)
class Form:
    """What lines look like, and how one is asked for; `{key}` and `{value}` are put in.

    `cue` begins the answer, so that the value comes first in what the model adds; `closing` comes after the value.
    """

    name: str
    draw: Draw
    opening: str
    line: str
    question: str
    cue: str
    closing: str


FORMS = (
    Form(
        "line",
        _registers,
        "Below is a record of lines. Each line has a name and a number, its <REGISTER_CONTENT>. Remember them: "
        "afterwards you are asked for one of the numbers.",
        "line {key}: REGISTER_CONTENT is <{value}>\n",
        "\nThe record is over. What is the <REGISTER_CONTENT> of line {key}? Repeat this line.\n",
        "line {key}: REGISTER_CONTENT is <",
        ">",
    ),
    Form(
        "key-value",
        _hex_pairs,
        "Below are the entries of a JSON object, keys with their values. Remember them: afterwards you are asked for "
        "the value of one of the keys.",
        '"{key}": "{value}",\n',
        '\nThe object is over. What is the value of the key "{key}"? Repeat this entry.\n',
        '"{key}": "',
        '"',
    ),
)


@dataclass(frozen=True, slots=True)
class Frame:
    """Token ids that a model wants before and after a message; its tokenizer encodes what is between."""

    tokenizer: Tokenizer
    before: list[int]
    after: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Frame:
        """The chat template's; of a model without one, what begins a text.

        Raises CheckpointError for a template that does not show a message exactly once.
        """
        if tokenizer.text.chat_template is None:
            return cls(tokenizer, tokenizer.encode(""), [])
        parts = tokenizer.chat_template.render([{"role": "user", "content": PLACEHOLDER}]).split(PLACEHOLDER)
        if len(parts) != 2:
            raise CheckpointError(f"the chat template shows a message {len(parts) - 1} times, expected once")
        before, after = (tokenizer.encode(part, special=False) for part in parts)
        return cls(tokenizer, before, after)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, special=False)

    def dots(self, count: int) -> list[int]:
        """Exactly `count` tokens."""
        return (self.encode(DOTS) * count)[:count]

    def question(self, form: Form, key: str) -> list[int]:
        """All that comes after the haystack."""
        return [*self.encode(form.question.format(key=key)), *self.after, *self.encode(form.cue.format(key=key))]


@dataclass(frozen=True, slots=True)
class Needle:
    """A question about the line that is `depth` (0 to 1) into the haystack, and what it says."""

    depth: float
    question: list[int]  # token ids
    answer: str


@dataclass(frozen=True, slots=True)
class Haystack:
    """Token ids that all prompts begin with; with any needle's question behind them they are `length` tokens."""

    form: Form
    length: int
    ids: list[int] = field(repr=False)
    needles: list[Needle]


def make_haystack(form: Form, frame: Frame, length: int, needles: int, choice: random.Random) -> Haystack:
    """Prompts of exactly `length` tokens about as many lines as fit: a needle in each of `needles` equal parts.

    Each line is encoded alone. What is missing to `length` is made up for by dots, before the lines and before the
    shorter questions. Raises UsageError for a length that has no room for that many needles, or needs more keys than
    there are.
    """
    opening, gap = [*frame.before, *frame.encode(form.opening)], frame.encode("\n\n")
    room = length - len(opening) - len(gap)
    pairs, lines, longest = _fill(form, frame, room, choice)
    if len(pairs) < needles:
        raise UsageError(
            f"a prompt of {length} tokens has room for {len(pairs)} lines of the task {form.name!r}, {needles} needles "
            "were asked for: ask for fewer, or for longer prompts"
        )
    found = []
    for i in range(needles):
        at = choice.randrange(i * len(pairs) // needles, (i + 1) * len(pairs) // needles)
        question = frame.question(form, pairs[at][0])
        padded = [*frame.dots(longest - len(question)), *question]
        found.append(Needle(at / max(len(pairs) - 1, 1), padded, pairs[at][1]))
    dots = frame.dots(room - len(lines) - longest)
    return Haystack(form, length, [*opening, *dots, *gap, *lines], found)


def _fill(form: Form, frame: Frame, room: int, choice: random.Random) -> tuple[list[tuple[str, str]], list[int], int]:
    """As many lines as leave room for a question about any of them.

    Returns their keys and values, their token ids, and the tokens of the longest question.
    """
    pairs, lines, longest = list[tuple[str, str]](), list[int](), 0
    for key, value in form.draw(choice):
        line = frame.encode(form.line.format(key=key, value=value))
        longest_with = max(longest, len(frame.question(form, key)))
        if len(lines) + len(line) + longest_with > room:
            return pairs, lines, longest
        lines += line
        pairs.append((key, value))
        longest = longest_with
    raise UsageError(f"there are names for {len(pairs)} lines only: ask for shorter prompts")
