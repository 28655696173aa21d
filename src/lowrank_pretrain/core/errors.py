"""Define the exception for a user's mistake (one line: key, value, what is allowed), and the one for NaN before sending."""

from typing import Any


class ConfigError(ValueError):
    """Report a wrong value in a configuration or a constructor.

    The command line prints it as one line, without a traceback, and exits with code 2.

    Args:
        key: the argument's or configuration key's name, e.g. ``"warmup"`` or ``"data.root"``.
        value: what was given.
        allowed: what would have been right, as the end of a sentence, e.g. ``"must be 0 or more windows"``.
    """

    def __init__(self, key: str, value: Any, allowed: str) -> None:
        super().__init__(key, value, allowed)
        self.key, self.value, self.allowed = key, value, allowed

    def __str__(self) -> str:
        return f"{self.key}={self.value!r}: {self.allowed}"


class NotFinite(RuntimeError):
    """Report that a worker is about to send NaN or infinite values to the others."""
