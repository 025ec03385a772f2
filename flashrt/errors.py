"""Named errors. Every one says what was found, what was expected and what to do about it."""

from __future__ import annotations


class FlashrtError(Exception):
    """Base of every error that flashrt raises on purpose; the CLI prints it as one message, without a traceback."""


class UsageError(FlashrtError):
    """An argument is out of range, malformed or contradicts another one."""


class CheckpointError(FlashrtError):
    """A checkpoint is missing, damaged, incomplete or of an unsupported kind."""


class UnsupportedModelError(CheckpointError):
    """The architecture, or a variant of it, is not one that flashrt runs."""


class PackError(FlashrtError):
    """A pack is missing, damaged or written by an incompatible version."""


class SessionError(FlashrtError):
    """A saved session is missing, damaged, or of another pack or version."""


class FlashrtWarning(UserWarning):
    """Base of what flashrt says on purpose beside what it does; the CLI prints it as a note."""


class CheckpointWarning(FlashrtWarning):
    """Of files that are at odds some were taken, and others were not."""


class BudgetWarning(FlashrtWarning):
    """A budget is granted that the machine or its operator may not grant."""


class SessionWarning(FlashrtWarning):
    """Something of what is kept in a directory of sessions could not be used or kept; the run goes on without."""


class BudgetError(FlashrtError):
    """The memory budget cannot hold what the run needs."""


class DiskError(FlashrtError):
    """A read or a write failed, or the disk lacks the room for one."""


class DeviceError(FlashrtError):
    """The device asked for is absent or cannot do what was asked."""
