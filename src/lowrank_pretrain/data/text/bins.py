r"""Write and open token files, ``.bin``: a 64-byte header and then only token ids, so a memmap is all that loading needs.

======  ======  =====================================================
offset  type    meaning
======  ======  =====================================================
0       8s      magic ``b"LRPTOKEN"``
8       uint32  version of the format, 1
12      uint32  bytes per token: 2 (uint16) or 4 (uint32)
16      uint32  vocabulary size; every id is below it
24      uint64  number of tokens
======  ======  =====================================================

All numbers are little-endian; the rest of the header is zero.
"""

import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.files import whole_file

MAGIC = b"LRPTOKEN"
VERSION = 1
HEADER = struct.Struct("<8sIIIIQ32x")  # 64 bytes
SCAN_LIMIT = 1 << 27  # tokens (256 MiB of uint16) that are checked against the vocabulary when a file is opened


def write_bin(path: str | Path, parts: Iterable[np.ndarray | list[int]], vocab_size: int) -> int:
    """Write token ids part by part; memory holds one part at a time.

    Args:
        path: the file to write. It appears whole or not at all.
        parts: sequences of token ids, e.g. one per document.
        vocab_size: every id must be below it; decides between uint16 and uint32.

    Returns:
        The number of tokens written.

    Raises:
        ConfigError: an id is negative or not below ``vocab_size``.
    """
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    count = 0
    with whole_file(path, "wb") as file:
        file.write(bytes(HEADER.size))
        for part in parts:
            ids = np.asarray(part, dtype=np.int64)
            if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
                wrong = int(ids[(ids < 0) | (ids >= vocab_size)][0])
                raise ConfigError("vocab_size", vocab_size, f"must be above every token id, found {wrong}")
            file.write(ids.astype(dtype).tobytes())
            count += ids.size
        file.seek(0)
        file.write(HEADER.pack(MAGIC, VERSION, dtype.itemsize, vocab_size, 0, count))
    return count


def open_bin(path: str | Path, vocab_size: int | None = None, key: str = "root") -> tuple[np.ndarray, int]:
    """Open a token file as a read-only memmap.

    Args:
        path: a ``.bin`` file written by :func:`write_bin`.
        vocab_size: the model's vocabulary; the file's ids must be below it. None: the file's own.
        key: the configuration key to blame.

    Returns:
        The ids, shape (count,), uint16 or uint32, and the file's vocabulary size.

    Raises:
        ConfigError: missing, empty, truncated, not of this format, or with ids beyond the vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(key, str(path), "no such file; write it with `python -m lowrank_pretrain.data.prepare`")
    size = path.stat().st_size
    head = path.open("rb").read(HEADER.size)
    if len(head) < HEADER.size or head[:8] != MAGIC:
        what = "is empty" if size == 0 else "has no token file header"
        raise ConfigError(key, str(path), f"{what}; write it with `python -m lowrank_pretrain.data.prepare`")
    _, version, width, vocab, _, count = HEADER.unpack(head)
    if version != VERSION or width not in (2, 4):
        raise ConfigError(key, str(path), f"must be version {VERSION} with 2 or 4 bytes a token, is {version}/{width}")
    want = HEADER.size + count * width
    if size != want or count == 0:
        raise ConfigError(key, str(path), f"must be {want} bytes for its {count} tokens (at least 1), is {size}: truncated?")
    tokens = np.memmap(path, np.dtype(f"<u{width}"), "r", offset=HEADER.size, shape=(count,))
    if vocab_size is not None and vocab > vocab_size:
        raise ConfigError("vocab_size", vocab_size, f"must be at least {vocab}, the vocabulary of {path}")
    if count <= SCAN_LIMIT:  # a larger file is checked batch by batch
        check_ids(tokens, min(vocab, vocab_size or vocab), path)
    return tokens, vocab


def check_ids(ids: np.ndarray, vocab_size: int, path: str | Path) -> None:
    """Refuse token ids that are not below ``vocab_size``, with the name of their file.

    Raises:
        ConfigError: an id is too large.
    """
    largest = int(ids.max())
    if largest >= vocab_size:
        raise ConfigError("vocab_size", vocab_size, f"must be above every token id, {path} holds {largest}")
