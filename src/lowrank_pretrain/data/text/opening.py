"""Open the documents of a part: local files by globs, a saved set or a set on the hub. Errors are one line."""

import codecs
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import missing_words, optional_import
from lowrank_pretrain.core.text import first_line
from lowrank_pretrain.data.text.documents import Documents, FileDocuments, HubDocuments, SavedDocuments
from lowrank_pretrain.data.text.files import is_packed, kind_of, not_utf8, open_bytes

if TYPE_CHECKING:
    from datasets import Dataset

PEEK = 1 << 20  # bytes of each local file that are checked for UTF-8 when it is opened
SAVED = ("state.json", "dataset_dict.json")  # of `datasets`' save_to_disk


def open_documents(
    root: str | None,
    files: str | list[str],
    files_key: str,
    dataset: str | None,
    config: str | None,
    split: str,
    split_key: str,
    text_key: str,
) -> Documents:
    """Open the documents of a part.

    Args:
        root: folder of local files, or one that `datasets` saved with ``save_to_disk``; not used with ``dataset``.
        files: glob(s) below ``root``: json lines, csv, parquet, txt or md (a file is one document), packed or not.
        files_key: the configuration key that held ``files``.
        dataset: a set on the hub, e.g. ``allenai/c4``, or a saved folder; None: local files.
        config: its configuration, e.g. ``en``.
        split: its split.
        split_key: the configuration key that held ``split``.
        text_key: the column with the text.

    Raises:
        ConfigError: nothing there, not readable, or a package that is not installed.
    """
    folder = saved_folder(root if dataset is None else dataset, split)
    if folder is not None:
        return SavedDocuments(_load_saved(folder, split, split_key), folder, "root" if dataset is None else "dataset", text_key)
    if dataset is None:
        return FileDocuments(find_files(root, files, files_key), files_key, text_key)
    with optional_import("dataset", dataset):
        from datasets import load_dataset
    try:
        return HubDocuments(load_dataset(dataset, config, split=split, streaming=True), dataset, text_key)
    except Exception as error:
        message = first_line(error)
        if "split" in message.lower():
            raise ConfigError(split_key, split, message) from error
        hint = f"; {missing_words('zstandard')}" if "zstd" in message else ""
        raise ConfigError("dataset", dataset, f"cannot be opened: {message}{hint}") from error


def saved_folder(root: str | None, split: str) -> Path | None:
    """Find a folder below ``root`` that ``save_to_disk`` wrote; None if there is none."""
    if root is None:
        return None
    folders = (Path(root), Path(root) / split)
    return next((folder for folder in folders if any((folder / name).is_file() for name in SAVED)), None)


def _load_saved(folder: Path, split: str, split_key: str) -> "Dataset":
    with optional_import("root", str(folder)):
        from datasets import DatasetDict, load_from_disk
    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # pyarrow's and others' classes
        raise ConfigError("root", str(folder), f"cannot be read as a saved set: {first_line(error)}") from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise ConfigError(split_key, split, f"must be a split of the saved set, there are: {', '.join(found)}")
        return found[split]
    if folder.name != split:
        cure = "save a DatasetDict, as Dataset.train_test_split makes one"
        raise ConfigError(split_key, split, f"is not told apart in {folder}, a saved set without splits: {cure}")
    return found


def find_files(root: str | None, patterns: str | list[str], key: str) -> list[Path]:
    """Find the local files that match, and those in folders that match, sorted.

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
    if not all(patterns) or any(Path(pattern).is_absolute() for pattern in patterns):
        raise ConfigError(key, patterns, f"must be globs for files below {root}, such as train*")
    found = {path for pattern in patterns for path in Path(root).glob(pattern)}
    found |= {path for folder in found if folder.is_dir() for path in folder.rglob("*")}
    # names with a dot at the beginning come from an operating system or an editor
    files = sorted(path for path in found if path.is_file() and not path.name.startswith("."))
    if not files:
        there = sorted(path.name for path in Path(root).iterdir() if not path.name.startswith("."))
        names = f"; there are: {', '.join(there[:10])}{'…' if len(there) > 10 else ''}" if there else ", the folder is empty"
        cure = "; `python -m lowrank_pretrain.data.prepare` holds a part out" if key == "val_files" else ""
        raise ConfigError(key, patterns, f"must match files under {root}, matches none{names}{cure}")
    kinds = {kind_of(path, key) for path in files}
    if len(kinds) > 1:
        raise ConfigError(key, patterns, f"must match one kind of file, matches {' and '.join(sorted(kinds))}")
    for path in files:
        check_utf8(path, key, limit=PEEK)
    return files


def check_utf8(path: Path, key: str, limit: int | None = None) -> None:
    """Refuse a file that is empty or not UTF-8.

    Rows of JSON are not checked here: a bad one is left out and counted.

    Args:
        path: the file.
        key: the configuration key to blame.
        limit: check about so many bytes from the beginning; None: all.

    Raises:
        ConfigError: names file and byte.
    """
    if path.stat().st_size == 0:
        raise ConfigError(key, str(path), "must not be empty")
    kind = kind_of(path, key)
    if kind == "parquet":
        return
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        with open_bytes(path) as file:
            while (limit is None or position < limit) and (chunk := file.read(PEEK)):
                if kind != "json":
                    decoder.decode(chunk)
                position += len(chunk)
    except UnicodeDecodeError as error:
        raise not_utf8(path, key, error, position) from error
    except ConfigError:
        raise
    except Exception as error:  # gzip, bz2, lzma and zstandard have their own errors
        if is_packed(path) or isinstance(error, (OSError, EOFError, zlib.error)):
            raise ConfigError(key, str(path), f"cannot be unpacked: {first_line(error)}") from error
        raise


def read_error(error: Exception, key: str, paths: list[Path]) -> ConfigError:
    """Return the error for an interrupted read; it names the local file to blame, if known."""
    if isinstance(error, ConfigError):
        return error
    for path in paths:
        try:
            check_utf8(path, key)
        except ConfigError as found:
            return found
    names = ", ".join(str(path) for path in paths[:3]) + ("…" if len(paths) > 3 else "")
    return ConfigError(key, names or None, f"cannot be read: {first_line(error)}")
