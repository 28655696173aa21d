"""Compare data with the checksums that the script which made them has written next to them, in ``SHA256SUMS``.

A set that is made on the spot can be made again over an older one, copied in part, or damaged: a run would not notice.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lowrank_pretrain.core.errors import ConfigError

SUMS = "SHA256SUMS"
LARGEST = 1 << 30  # bytes of a file that is read whole for this when a run starts


def check_sums(folder: Path, found: Mapping[str, Path | np.ndarray], key: str) -> None:
    """Refuse data that are not those of the folder's ``SHA256SUMS``; what it does not name may be anything.

    Args:
        folder: of the data. Without ``SHA256SUMS`` in it nothing is checked.
        found: by the name in that file: a file, or the array whose bytes count.
        key: the configuration key to blame.

    Raises:
        ConfigError: naming the first that differs.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    noted = {name.strip().lstrip("*"): digest for digest, _, name in (line.partition(" ") for line in lines)}
    for name, data in found.items():
        if name in noted and (mine := _digest(data)) is not None and mine != noted[name].lower():
            cure = f"make the set again, or delete {SUMS} if the change is meant"
            raise ConfigError(key, str(folder), f"{name} is not what {SUMS} names, so it was changed or damaged: {cure}")


def _digest(data: Path | np.ndarray) -> str | None:
    """Return the SHA-256 of a file or an array's bytes; None for a file that is too large to read, or gone."""
    if isinstance(data, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(data).data).hexdigest()
    if not data.is_file() or data.stat().st_size > LARGEST:
        return None
    found = hashlib.sha256()
    with data.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
