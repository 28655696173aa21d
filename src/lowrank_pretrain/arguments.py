"""One style of arguments for all commands: ``key=value`` and ``--key value`` (also ``--key=value``) mean the same."""

from collections.abc import Collection, Sequence

from .errors import ConfigError
from .models.wording import closest


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


def as_flags(argv: Sequence[str], flags: Collection[str]) -> list[str]:
    """Turn ``key=value`` into ``--key=value`` where `flags` has ``--key``, for argparse; all other words stay as they are."""
    found = []
    for word in argv:
        name, equals, value = word.partition("=")
        flag = f"--{name.replace('_', '-')}"
        found += [flag, value] if equals and flag in flags and not word.startswith("-") else [word]
    return found
