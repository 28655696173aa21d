"""Format short texts for people: numbers, a library's message on one line, and similar names."""

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # rich is an extra
    from rich.console import Console

NARROWEST = 40  # columns of a terminal; COLUMNS=0 in the environment would hide everything


def format_number(value: float) -> str:
    """Return a number with four digits and no positive exponent.

    Example:
        >>> format_number(118.68), format_number(0.28716), format_number(370912.0)
        ('118.7', '0.2872', '370,912')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def one_line(message: object, limit: int | None = 240) -> str:
    r"""Return an error's message, or any text, on one line.

    Args:
        message: an exception, or anything with a text form. An exception without a message is called by its type.
        limit: the most characters; a longer line ends with ``…``. None: no limit.

    Example:
        >>> one_line(ValueError("sizes differ:\n  3 and 4"))
        'sizes differ: 3 and 4'
        >>> one_line(KeyboardInterrupt())
        'KeyboardInterrupt'
        >>> one_line("a long story", limit=7)
        'a long…'
    """
    text = " ".join(str(message).split()) or type(message).__name__
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def wide_enough(console: "Console") -> "Console":
    """Return a console on which a table can be read, even if the environment says that it has no columns."""
    console.width = max(console.width, NARROWEST)
    return console


def first_line(error: BaseException | None) -> str:
    r"""Return the first line of an error's message, for libraries that put the reason there and advice below.

    Example:
        >>> first_line(OSError("no such split\nuse train or test"))
        'no such split'
    """
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def closest(value: str, names: Iterable[str]) -> str:
    """Return the end of an error line: up to three names that look like a value, or the first twelve.

    Example:
        >>> closest("warmpu", ["warmup", "window", "ranks"])
        'close matches: warmup'
        >>> closest("x", ["warmup", "ranks"])
        'there are: ranks, warmup'
    """
    names = sorted(names)
    close = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    if close:
        return "close matches: " + ", ".join(close)
    return "there are: " + ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
