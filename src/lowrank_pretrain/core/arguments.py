"""One style of arguments for all commands: ``key=value`` and ``--key value`` (also ``--key=value``) mean the same."""

import re
import sys
from argparse import ArgumentParser
from collections.abc import Collection, Sequence

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.models.checks import closest


def key_values(argv: Sequence[str], keys: Collection[str]) -> dict[str, str]:
    """Read ``key=value``, ``--key value`` and ``--key=value`` into a dictionary.

    Args:
        argv: the arguments.
        keys: those that there are; ``-`` and ``_`` are the same.

    Raises:
        ConfigError: no such key, a key without its value, or a word that is neither.
    """
    given: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if key not in keys:
            raise ConfigError(name, value or None, f"no such argument; {closest(key, keys)}")
        if not equals:
            value = next(words, None) if name.startswith("--") else None
            if value is None:
                raise ConfigError(name, None, f"needs a value: {key}=VALUE or --{key.replace('_', '-')} VALUE")
        given[key] = value
    return given


def as_flags(argv: Sequence[str] | None, parser: ArgumentParser) -> list[str]:
    """Turn ``key=value`` into ``--key value`` where `parser` has ``--key``.

    All other words stay as they are: a directory's name may have a sign of equality in it.

    Args:
        argv: the arguments; None: the process's.
        parser: takes what is returned.
    """
    flags = re.findall(r"--[a-z][a-z-]*", parser.format_usage())
    found = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=")
        flag = f"--{name.replace('_', '-')}"
        found += [flag, value] if equals and flag in flags else [word]
    return found
