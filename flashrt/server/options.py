"""What a user asks of a server beside the model, checked before anything is opened."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from flashrt.config import number, whole
from flashrt.errors import UsageError

KEY_VARIABLE = "FLASHRT_API_KEY"
DEFAULT_PORT = 8000
SHORTEST_KEY = 8  # characters


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerOptions:
    """Raises UsageError for a field out of range, and for an address beyond this machine without a key.

    names: those that requests may call the model by, beside its own
    queue: requests that may wait; seconds: those that a request may take; grace: those that a stop leaves it
    body_bytes: of a request, at most; None: 1 MiB, or 16 a token of context
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    key: str | None = None
    insecure: bool = False
    names: tuple[str, ...] = ()
    queue: int = 16
    seconds: float = 3600.0
    grace: float = 10.0
    body_bytes: int | None = None
    alive_seconds: float = 10.0  # without a word, after which a comment keeps a stream alive

    def __post_init__(self) -> None:
        whole("--port", self.port, 0, 65535)
        whole("--queue", self.queue, 0, 10_000)
        number("--timeout-s", self.seconds, 0.1, 1e7)
        number("--grace-s", self.grace, 0.0, 1e5)
        if self.body_bytes is not None:
            whole("the size of a body", self.body_bytes, 1 << 10, 1 << 30)
        if self.key is None and not self.insecure and not self.loopback:
            raise UsageError(
                f"--host {self.host} lets other machines in, and there is no key: give --api-key-file FILE or "
                f"{KEY_VARIABLE}, or --insecure if whoever reaches this port may use the model"
            )

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def longest_body(self, context: int) -> int:
        """Bytes of a request."""
        return self.body_bytes or max(1 << 20, 16 * context)


def read_key(file: Path | None, variable: str | None) -> str | None:
    """The key in a file, or else in the environment; None where neither is given. Raises UsageError."""
    if file is None:
        key, where = variable, KEY_VARIABLE
    else:
        try:
            key, where = file.read_text().strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not text"
            raise UsageError(f"the key in {file} cannot be read: {why}") from None
    if key is None:
        return None
    if len(key) < SHORTEST_KEY or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{where} holds no key: expected {SHORTEST_KEY} printable ASCII characters or more, no spaces")
    return key
