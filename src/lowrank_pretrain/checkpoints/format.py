"""Number the format of this package's entries in a checkpoint, and refuse formats that cannot be read.

The side entry ``checkpoint["lowrank_pretrain"]`` and the strategy's ``lte_state`` each have a ``format``. **The policy**: a
version of this package loads every format up to its own. An entry without one, from before formats were counted, is read as 1.
A newer one is refused in one line that says to update. The number goes up only when an older reader would misread the file; the
reader of the older format is then kept.
"""

from typing import Any

from lowrank_pretrain.core.checks import is_integer
from lowrank_pretrain.core.errors import ConfigError

SIDE = "lowrank_pretrain"  # the side entry's key
FORMAT = 1  # of the side entry and of ``lte_state``


def check_format(entry: Any, path: Any, key: str = "ckpt_path", name: str = SIDE) -> None:
    """Refuse an entry of a checkpoint that this version cannot read.

    Args:
        entry: the side entry, or ``lte_state``.
        path: the file, for the message.
        key: the argument that named the file.
        name: the entry's key in the checkpoint, for the message.

    Raises:
        ConfigError: a newer format, or one that no version of this package wrote.

    Example:
        >>> check_format({"format": FORMAT}, "last.ckpt")
        >>> check_format({"format": 7}, "last.ckpt")
        Traceback (most recent call last):
        lowrank_pretrain.core.errors.ConfigError: ckpt_path='last.ckpt': has format 7, this version reads up to 1: update ...
    """
    version = entry.get("format", FORMAT)
    if is_integer(version) and version > FORMAT:
        where = "" if name == SIDE else f" in its entry {name}"
        allowed = f"has format {version}{where}, this version reads up to {FORMAT}: update lowrank_pretrain"
        raise ConfigError(key, str(path), allowed)
    if not is_integer(version) or version < 1:
        raise ConfigError(key, str(path), f"is damaged or not ours: its entry {name}.format is {str(version)[:60]!r}")
