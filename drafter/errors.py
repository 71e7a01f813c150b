"""The errors a user can cause or mend; each knows the exit code of the command that meets it.

The message is one plain sentence: the thing, the value found, the value needed, the command that
mends it. The command line prints the message without a traceback; any other exception is a bug.
"""

from __future__ import annotations

from typing import ClassVar


class SlimSpecError(Exception):
    """Base of every error with a message meant for the user."""

    exit_code: ClassVar[int] = 2


class CheckFailed(SlimSpecError):
    """A comparison that had to hold did not (exit code 1)."""

    exit_code: ClassVar[int] = 1


class UsageError(SlimSpecError):
    """Wrong use, bad input or a corrupt file (exit code 2)."""

    exit_code: ClassVar[int] = 2


class UnsupportedTarget(UsageError):
    """A sound target that this project's own decoder cannot compute; `transformers` may."""


class MissingError(SlimSpecError):
    """Something this machine lacks: a package, a download, disk space, a device (exit code 3)."""

    exit_code: ClassVar[int] = 3
