"""Read the arguments of all commands in one style: ``key=value``, ``--key value`` and ``--key=value`` mean the same."""

import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Mapping, Sequence

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.text import closest


def key_values(argv: Sequence[str], keys: Collection[str]) -> dict[str, str]:
    """Read ``key=value``, ``--key value`` and ``--key=value`` into a dictionary.

    Args:
        argv: the arguments.
        keys: the keys that exist; ``-`` and ``_`` mean the same.

    Raises:
        ConfigError: no such key, a key without a value, or a word in another form.

    Example:
        >>> key_values(["out=here", "--min-freq", "2"], ("out", "min_freq"))
        {'out': 'here', 'min_freq': '2'}
    """
    given: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if key not in keys:
            raise ConfigError(name, value or None, f"no such argument; {closest(key, keys)}")
        found = value if equals else next(words, None) if name.startswith("--") else None
        if found is None:
            raise ConfigError(name, None, f"needs a value: {key}=VALUE or --{key.replace('_', '-')} VALUE")
        given[key] = found
    return given


def as_flags(argv: Sequence[str] | None, parser: ArgumentParser) -> list[str]:
    """Turn ``key=value`` into ``--key value`` where `parser` has ``--key``.

    All other words are unchanged: a directory's name may contain an equals sign.

    Args:
        argv: the arguments. None: those of the process.
        parser: parses what is returned.
    """
    flags = re.findall(r"--[a-z][a-z-]*", parser.format_usage())
    found = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=")
        flag = f"--{name.replace('_', '-')}"
        found += [flag, value] if equals and flag in flags else [word]
    return found


def command_parser(module: str, about: str | None) -> ArgumentParser:
    """Return a parser for ``python -m lowrank_pretrain.MODULE``, whose help is the module's docstring."""
    return ArgumentParser(
        prog=f"python -m lowrank_pretrain.{module}", description=about, formatter_class=RawDescriptionHelpFormatter
    )


def print_counts(write: Callable[[], Mapping[str, int]], line: Callable[[str, int], str]) -> int:
    """Run a command that writes data, print what it has written, and return the exit code: 2 for a wrong value.

    Args:
        write: returns the number of what was written, by split.
        line: returns what is printed for a split and its number.
    """
    try:
        counts = write()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:  # a folder that is a file, cannot be written to, or is full
        print(f"error: {error.filename or 'out'}: {error.strerror or error}", file=sys.stderr)
        return 2
    for split, count in counts.items():
        print(line(split, count))
    return 0
