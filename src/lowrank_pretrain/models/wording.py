"""What both models need to talk to a user: plain values in, one readable line out."""

import difflib
from collections.abc import Iterable
from typing import Any

from omegaconf import OmegaConf

from lowrank_pretrain.errors import ConfigError


def plain(value: Any) -> Any:
    """`value` with OmegaConf's containers turned into dicts and lists (checkpoints hold plain types only)."""
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def closest(value: str, names: Iterable[str]) -> str:
    """The end of an error line: up to three of `names` that look like `value`, or the first few there are."""
    names = sorted(names)
    close = difflib.get_close_matches(value, names, n=3, cutoff=0.5)
    if close:
        return "close matches: " + ", ".join(close)
    return "there are: " + ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")


def one_line(error: BaseException, limit: int = 240) -> str:
    """A library's message on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def check_count(key: str, value: Any, least: int = 1) -> None:
    """Raises :class:`ConfigError` unless `value` is an int (no bool) of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(key, value, f"must be an integer of at least {least}")
