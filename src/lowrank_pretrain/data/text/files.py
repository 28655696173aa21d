"""Read local text files row by row or block by block, each with the place that follows it.

Memory holds one row, or one block of a text file; a row's text is handed on in pieces. A place is plain numbers, so that a
checkpoint can keep it and reading continues exactly there.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import

KINDS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".txt": "text", ".md": "text", ".text": "text",
    ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
PACKED = (".gz", ".zst", ".bz2", ".xz")
BLOCK = 1 << 16  # bytes of a text file, or characters of a row, that are tokenised at a time
BOM = b"\xef\xbb\xbf"
DELIMITERS = ",;\t|"


class BadRow(Exception):
    """Report a row without text in the column asked for; the message describes the row."""


class Row(NamedTuple):
    """Describe one row of a file.

    Attributes:
        number: counted from 1, for messages.
        size: its approximate length, the same for every reader of the file.
        text: reads the text; raises BadRow.
        after: where the next row begins.
    """

    number: int
    size: int
    text: Callable[[], str]
    after: Any


def kind_of(path: Path, key: str) -> str:
    """Return ``json``, ``parquet``, ``csv`` or ``text``, by the file's name."""
    name = path.name.lower()
    name = name[: -len(Path(name).suffix)] if name.endswith(PACKED) else name
    kind = KINDS.get(Path(name).suffix)
    if kind is None or (kind == "parquet" and path.suffix.lower() in PACKED):
        allowed = f"must end in {', '.join(KINDS)}, these perhaps followed by {', '.join(PACKED)}; narrow the pattern"
        raise ConfigError(key, str(path), allowed)
    return kind


def open_bytes(path: Path) -> BinaryIO:
    """Open the file's bytes, unpacked.

    Raises:
        ConfigError: ``.zst`` without its package.
    """
    packing = path.suffix.lower()
    if packing == ".gz":
        return cast(BinaryIO, gzip.open(path))
    if packing == ".bz2":
        return cast(BinaryIO, bz2.open(path))
    if packing == ".xz":
        return cast(BinaryIO, lzma.open(path))
    if packing == ".zst":
        with optional_import("root", str(path)):
            import zstandard
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), read_across_frames=True))
    return path.open("rb")


def is_packed(path: Path) -> bool:
    """Return whether the file is compressed, so its bytes are not its text."""
    return path.suffix.lower() in PACKED


# ---- text


class Blocks:
    """Cut a text file into blocks of about ``block`` bytes, at ends of lines, else before a space, else between letters.

    The beginning of block k depends on the file and on k alone, so readers share a file by numbers of blocks.

    Args:
        path: the file.
        key: the configuration key to blame.
        block: bytes.
    """

    def __init__(self, path: Path, key: str, block: int = BLOCK) -> None:
        self.path, self.key, self.block = path, key, block
        self._file = open_bytes(path)
        self._buffer, self._base = b"", 0  # of a packed file, which is read forwards only

    def count(self) -> int | None:
        """Return the number of blocks, None for a packed file."""
        return None if is_packed(self.path) else -(-self.path.stat().st_size // self.block)

    def begin(self, k: int) -> int | None:
        """Return the first byte of block ``k``, None at the end of the file."""
        at = k * self.block
        window = self._read(at, self.block)
        if not window or k == 0:
            return 0 if k == 0 and window else None
        end = window.find(b"\n")
        while 0 <= end < len(window) - 1 and window[end + 1 : end + 2].isspace():
            end = window.find(b"\n", end + 1)
        if end >= 0:
            return at + end + 1
        space = window.find(b" ")
        return at + (space if space >= 0 else next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0))

    def text(self, k: int) -> tuple[str, bool] | None:
        """Return block ``k``, and whether it is the last; None after the last.

        Raises:
            ConfigError: it is not UTF-8.
        """
        start, stop = self.begin(k), self.begin(k + 1)
        if start is None:
            return None
        data = self._read(start, 2 * self.block if stop is None else stop - start)
        last = stop is None or not self._read(stop, 1)
        if not data:
            return None
        try:
            text = data.removeprefix(BOM if start == 0 else b"").decode()
        except UnicodeDecodeError as error:
            shift = len(BOM) if start == 0 and data.startswith(BOM) else 0
            raise not_utf8(self.path, self.key, error, start + shift) from error
        return text.replace("\r\n", "\n").replace("\r", "\n"), last

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, at: int, size: int) -> bytes:
        if not is_packed(self.path):
            self._file.seek(at)
            return self._file.read(size)
        while self._base + len(self._buffer) < at + size and (chunk := self._file.read(self.block)):
            self._buffer += chunk
            old = max(0, at - 2 * self.block - self._base)
            self._buffer, self._base = self._buffer[old:], self._base + min(old, len(self._buffer))
        return self._buffer[max(0, at - self._base) : max(0, at - self._base) + size] if at >= self._base else b""


def not_utf8(path: Path, key: str, error: UnicodeDecodeError, begin: int) -> ConfigError:
    """Return the error that names the file and the byte."""
    wrong = f"byte 0x{error.object[error.start]:02x} near position {begin + error.start}"
    return ConfigError(key, str(path), f"must be UTF-8 text, {wrong} is not; convert it with iconv")


# ---- rows


def rows_of(path: Path, kind: str, text_key: str, key: str, place: Any = None) -> Iterator[Row]:
    """Read the rows of a file of the kind ``json``, ``csv`` or ``parquet``, from ``place`` on.

    Args:
        path: the file.
        kind: see :func:`kind_of`.
        text_key: the column with the text.
        key: the configuration key to blame.
        place: an earlier row's ``after``; None: the beginning.

    Raises:
        ConfigError: the whole file has no such column.
    """
    if kind == "parquet":
        return _parquet(path, text_key, place)
    if kind == "csv":
        return _csv(path, text_key, key, place)
    return _json_array(path, text_key, place) if _is_array(path) else _json_lines(path, text_key, place)


def text_of(row: Any, text_key: str) -> str:
    """Return the text of a row.

    Raises:
        BadRow: it has none.
    """
    if not isinstance(row, dict):
        raise BadRow(f"holds no keys but {type(row).__name__}")
    if text_key not in row:
        raise BadRow(f"has no {text_key!r}, it has: {', '.join(sorted(map(str, row))) or 'nothing'}")
    if not isinstance(row[text_key], str):
        value = json.dumps(row[text_key], default=str)
        raise BadRow(f"holds no text in {text_key!r} but {value if len(value) <= 40 else value[:39] + '…'}")
    try:
        row[text_key].encode()
    except UnicodeEncodeError as error:  # JSON can write one half of a pair such as \ud83d, which no tokenizer takes
        raise BadRow(f"holds half of a letter's code in {text_key!r}, at letter {error.start}") from error
    return row[text_key]


def _json_lines(path: Path, text_key: str, place: Any) -> Iterator[Row]:
    at, number = place or (0, 0)
    with open_bytes(path) as file:
        _skip(file, at)
        for line in file:
            begin, at = at, at + len(line)
            if begin == 0:
                line = line.removeprefix(BOM)
            if not line.strip():
                continue
            number += 1
            yield Row(number, len(line), partial(_text_of_line, line, text_key), (at, number))


def _text_of_line(line: bytes, text_key: str) -> str:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise BadRow("is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"is no JSON ({str(error)[:60]})") from error
    return text_of(row, text_key)


def _is_array(path: Path) -> bool:
    """Return whether a JSON file is one array or one object over several lines, not an object a line."""
    with open_bytes(path) as raw:
        head = raw.read(1 << 16).removeprefix(BOM).lstrip()
    first = head.partition(b"\n")[0]
    if head[:1] == b"[":  # a line may be an array too: of something that is no row
        return not first.rstrip().endswith(b"]") or first.lstrip(b"[ \t")[:1] == b"{"
    return head[:1] == b"{" and b"\n" in head and first.strip() in (b"{",)


def _json_array(path: Path, text_key: str, place: Any) -> Iterator[Row]:
    """Read the objects of an array, or consecutive objects. To continue, the file is read again from its beginning."""
    done = place or 0
    decoder, buffer, number, at = json.JSONDecoder(), "", 0, 0
    with open_bytes(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8-sig")
        more = True
        while True:
            while at < len(buffer) and (buffer[at].isspace() or buffer[at] in "[,]"):
                at += 1
            try:
                row, end = decoder.raw_decode(buffer, at)
            except ValueError as error:
                if more:
                    chunk = text.read(1 << 20)
                    more = bool(chunk)
                    buffer, at = buffer[at:] + chunk, 0
                    continue
                if at < len(buffer):
                    raise ValueError(f"is no JSON after its {number} rows: {error}") from error
                return
            number, size, at = number + 1, end - at, end
            if number > done:
                yield Row(number, size, partial(text_of, row, text_key), number)


def _csv(path: Path, text_key: str, key: str, place: Any) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # a cell may be a whole book
    with open_bytes(path) as file:
        at, header = 0, file.readline()
        delimiter, names = _header(path, header.removeprefix(BOM), text_key)
        column = names.index(text_key)
        at, number = place or (len(header), 0)
        if place:
            _skip(file, at - len(header))

        def lines() -> Iterator[str]:
            nonlocal at
            for line in file:
                try:
                    decoded = line.decode()
                except UnicodeDecodeError as error:
                    raise not_utf8(path, key, error, at) from error
                at += len(line)
                yield decoded

        begin = at
        for cells in csv.reader(lines(), delimiter=delimiter):
            size, begin = at - begin, at
            if not cells:
                continue
            number += 1
            yield Row(number, size, partial(_cell, cells, column, text_key), (at, number))


def _header(path: Path, line: bytes, text_key: str) -> tuple[str, list[str]]:
    """Return the delimiter and the columns; the delimiter is the one that gives a column ``text_key``."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(path, "text_key", error, 0) from error
    found = {delimiter: next(csv.reader([text], delimiter=delimiter), []) for delimiter in DELIMITERS}
    for delimiter, names in found.items():
        if text_key in names:
            return delimiter, names
    names = [name if len(name) <= 40 else f"{name[:39]}…" for name in max(found.values(), key=len)]  # a file may have no header
    raise ConfigError("text_key", text_key, f"must name a column of text, there are: {', '.join(names)} (in {path})")


def _cell(cells: list[str], column: int, text_key: str) -> str:
    if column >= len(cells):
        raise BadRow(f"has no {text_key!r}, it has only {len(cells)} cells")
    return cells[column]


def _parquet(path: Path, text_key: str, place: Any) -> Iterator[Row]:
    with optional_import("root", str(path)):
        import pyarrow.parquet
    group, done = place or (0, 0)
    with pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        if text_key not in schema.names:
            names = ", ".join(schema.names)
            raise ConfigError("text_key", text_key, f"must name a column of text, there are: {names} (in {path})")
        before = sum(file.metadata.row_group(g).num_rows for g in range(group))
        for g in range(group, file.num_row_groups):
            i = 0
            for batch in file.iter_batches(batch_size=256, row_groups=[g], columns=[text_key]):
                column = batch.column(0)
                if i + len(column) <= done:
                    i += len(column)
                    continue
                for value in column.to_pylist():
                    i += 1
                    if i > done:
                        size = len(value) if isinstance(value, str) else 0
                        row = {text_key: value}
                        yield Row(before + i, size, partial(text_of, row, text_key), (g, i))
            before, done = before + i, 0


def _skip(file: BinaryIO, size: int) -> None:
    """Skip ``size`` bytes forwards."""
    if size and isinstance(file, io.BufferedReader) and isinstance(file.raw, io.FileIO):
        file.seek(size, io.SEEK_CUR)
        return
    while size > 0 and (chunk := file.read(min(size, 1 << 20))):
        size -= len(chunk)
