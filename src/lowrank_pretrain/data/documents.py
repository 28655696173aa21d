"""Documents from local files or the hub, one by one, through `datasets` in streaming mode; errors in one line."""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_pretrain.data.sources import first_line
from lowrank_pretrain.errors import ConfigError

if TYPE_CHECKING:
    from datasets import IterableDataset

KINDS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".txt": "text"}
PACKED = (".gz", ".zst", ".bz2", ".xz")
PEEK = 1 << 20  # bytes of each local file that are checked for UTF-8 when it is opened


def find_files(root: str | None, patterns: str | list[str], key: str) -> list[Path]:
    """The local files that match, sorted.

    Args:
        root: folder.
        patterns: one glob below it or several.
        key: the configuration key that held the patterns.

    Raises:
        ConfigError: no folder, no match, an unknown or a second kind of file, or a text file that is not UTF-8.
    """
    if root is None or not Path(root).is_dir():
        raise ConfigError("root", root, "must be an existing folder of text files (or give data.dataset, a set on the hub)")
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    files = sorted({path for pattern in patterns for path in Path(root).glob(pattern) if path.is_file()})
    if not files:
        raise ConfigError(key, patterns, f"must match files under {root}, matches none")
    kinds = {kind_of(path, key) for path in files}
    if len(kinds) > 1:
        raise ConfigError(key, patterns, f"must match one kind of file, matches {' and '.join(sorted(kinds))}")
    for path in files:
        check_utf8(path, key, limit=PEEK)
    return files


def kind_of(path: Path, key: str) -> str:
    """``json``, ``parquet`` or ``text``, by the file's name."""
    name = path.name[: -len(path.suffix)] if path.suffix in PACKED else path.name
    kind = KINDS.get(Path(name).suffix)
    if kind is None:
        raise ConfigError(key, str(path), f"must end in {', '.join(KINDS)}, these perhaps followed by {', '.join(PACKED)}")
    return kind


def check_utf8(path: Path, key: str, limit: int | None = None) -> None:
    """Raise a ConfigError that names file and byte if the file is empty or not UTF-8, as far as it is looked at."""
    if path.stat().st_size == 0:
        raise ConfigError(key, str(path), "must not be empty")
    if kind_of(path, key) == "parquet" or path.suffix not in ("", ".gz", *KINDS):
        return  # binary, or packed in a way that the standard library cannot open: `datasets` will tell
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            while (limit is None or position < limit) and (chunk := file.read(PEEK)):
                decoder.decode(chunk)
                position += len(chunk)
        except UnicodeDecodeError as error:
            wrong = f"byte 0x{error.object[error.start]:02x} near position {position + error.start}"
            allowed = f"must be UTF-8 text, {wrong} is not; convert it with iconv"
            raise ConfigError(key, str(path), allowed) from error
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(key, str(path), f"cannot be unpacked: {error}") from error


def open_documents(
    root: str | None,
    files: str | list[str],
    files_key: str,
    dataset: str | None,
    config: str | None,
    split: str,
    split_key: str,
) -> tuple["IterableDataset", list[Path]]:
    """A streaming set of documents, and its local files (none for the hub).

    Args:
        root: folder of local files; not used with ``dataset``.
        files: glob(s) below ``root``: json lines, parquet or txt (a file is one document), packed or not.
        files_key: the configuration key that held ``files``.
        dataset: a set on the hub, e.g. ``allenai/c4``; None: local files.
        config: its configuration, e.g. ``en``.
        split: its split.
        split_key: the configuration key that held ``split``.

    Raises:
        ConfigError: nothing there, not readable, or `datasets` not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError("dataset", dataset, "needs the package datasets: pip install lowrank_pretrain[hub]") from error
    if dataset is None:
        paths = find_files(root, files, files_key)
        kind = kind_of(paths[0], files_key)
        options = {"sample_by": "document"} if kind == "text" else {}
        try:
            data = {"train": [str(path) for path in paths]}
            return load_dataset(kind, data_files=data, split="train", streaming=True, **options), paths
        except Exception as error:  # one class for each library below `datasets`
            raise read_error(error, files_key, paths) from error
    try:
        return load_dataset(dataset, config, split=split, streaming=True), []
    except Exception as error:
        message = first_line(error)
        if "split" in message.lower():
            raise ConfigError(split_key, split, message) from error
        raise ConfigError("dataset", dataset, f"cannot be opened: {message}") from error


def texts(documents: "IterableDataset", text_key: str) -> Iterator[str]:
    """The documents' text. Read through ``iter``, which leaves the sharding among workers to us.

    Raises:
        ConfigError: a document has no ``text_key``, or something else than text there.
    """
    for row in documents.iter(batch_size=1):
        value: Any = row[text_key][0] if text_key in row else None
        if not isinstance(value, str):
            raise ConfigError("text_key", text_key, f"must name a column of text, there are: {', '.join(sorted(row))}")
        yield value


def read_error(error: Exception, key: str, paths: list[Path]) -> ConfigError:
    """What to say when reading broke off: the local file to blame if one can be found."""
    if isinstance(error, ConfigError):
        return error
    for path in paths:
        try:
            check_utf8(path, key)
        except ConfigError as found:
            return found
    names = ", ".join(str(path) for path in paths[:3]) + ("…" if len(paths) > 3 else "")
    return ConfigError(key, names or None, f"cannot be read: {first_line(error)}")
