"""What begins with a slash in a chat: commands, which no model sees."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashrt.cli.console import say
from flashrt.cli.conversation import Conversation
from flashrt.errors import UsageError

if TYPE_CHECKING:
    from flashrt.engine.report import Report

HINT = "/help lists commands, /exit or Ctrl-D ends the chat"
_COMMAND = re.compile(r"(/[a-z]+)(?:\s+(.*))?$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Command:
    """usage, help: as /help shows them; run: on a conversation and what follows the name; returns an answer's report"""

    usage: str
    help: str
    run: Callable[[Conversation, str], Report | None]


def parsed(message: str) -> tuple[Command, str] | None:
    """The command that a message is, and what follows its name; None for what a model answers.

    A path is a message: names of commands are letters. Raises UsageError for an unknown name.
    """
    found = _COMMAND.match(message.strip())
    if found is None:
        return None
    if found[1] not in COMMANDS:
        raise UsageError(f"there is no command {found[1]}: /help lists them")
    return COMMANDS[found[1]], (found[2] or "").strip()


def _help(conversation: Conversation, rest: str) -> None:
    for command in dict.fromkeys(COMMANDS.values()):
        say(f"{command.usage:<16} {command.help}")
    say('"""              begins a message of several lines, and ends it')
    say("Ctrl-C           stops an answer; twice, the chat")


def _reset(conversation: Conversation, rest: str) -> None:
    conversation.reset()
    say("[started over]")


def _retry(conversation: Conversation, rest: str) -> Report:
    report = conversation.retry()
    if conversation.sampling.temperature == 0:
        say("[the most likely tokens are taken: the answer stays the same without --temperature]")
    return report


def _system(conversation: Conversation, rest: str) -> None:
    if rest:
        conversation.instruct(rest)
    say(f"[system: {conversation.system}]" if conversation.system else "[there is no system message]")


def _save(conversation: Conversation, rest: str) -> None:
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise UsageError("there is nothing to save yet: say something first")
    file = _file("/save", rest)
    conversation.engine.save(file, conversation.messages)
    say(f"[saved in {file}: /load, or --session, goes on from it]")


def _load(conversation: Conversation, rest: str) -> None:
    file = _file("/load", rest)
    messages = conversation.engine.resume(file)
    if messages is None:
        raise UsageError(f"{file} is the session of a text: go on with `flashrt run --session`")
    conversation.take(messages)
    count = sum(message["role"] == "user" for message in messages)
    say(f"[{count} messages and their answers from {file}]")


def _file(command: str, rest: str) -> Path:
    if not rest:
        raise UsageError(f"{command} needs the name of a file")
    return Path(rest).expanduser()


def _exit(conversation: Conversation, rest: str) -> None:
    raise EOFError


_LEAVE = Command("/exit, /quit", "ends the chat, as Ctrl-D does", _exit)
COMMANDS = {
    "/help": Command("/help", "lists these", _help),
    "/retry": Command("/retry", "answers the last message again", _retry),
    "/system": Command("/system [TEXT]", "shows the system message, or sets it for what follows", _system),
    "/save": Command("/save FILE", "saves the chat, with what was computed of it", _save),
    "/load": Command("/load FILE", "goes on with a chat that was saved", _load),
    "/reset": Command("/reset", "starts over", _reset),
    "/exit": _LEAVE,
    "/quit": _LEAVE,
}
