"""Read the idx format of MNIST and its successors: a magic number, the sizes, then raw bytes; plain or gzipped."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from lowrank_pretrain.core.errors import ConfigError


def read_idx(path: str | Path) -> np.ndarray:
    """Read one idx file of unsigned bytes.

    Args:
        path: an ``…-ubyte`` file, gzipped when its name ends in ``.gz``.

    Returns:
        uint8 array; (N, H, W) for images, (N,) for labels.

    Raises:
        ConfigError: the file is not an idx file of bytes, or its length differs from its header.
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError("root", str(path), f"cannot be read as an idx file: {error}") from error
    # header: two zero bytes, the type (8 = unsigned byte), the number of dimensions, one big-endian int32 for each
    dims = raw[3] if len(raw) > 3 and raw[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * dims
    if dims == 0 or len(raw) < start:
        raise ConfigError("root", str(path), "must be an idx file of unsigned bytes (magic 00 00 08 …)")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">i4", dims, offset=4))
    want, have = int(np.prod(shape)), len(raw) - start
    if have != want:
        raise ConfigError("root", str(path), f"must hold {want} bytes after its header, holds {have}: truncated?")
    return np.frombuffer(bytearray(raw[start:]), np.uint8).reshape(shape)  # bytearray: writable, as torch wants it
