"""Write files whole or not at all, and read CSV tables."""

import contextlib
import csv
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def whole_file(path: str | os.PathLike, mode: str = "w", durable: bool = False) -> Iterator[IO[Any]]:
    """Open a file that replaces `path` when the block ends; after an error, `path` is unchanged.

    It is written under a hidden name in the same folder, ``.NAME.part``, and then renamed. A process that is killed may leave
    that file, and the next write overwrites it.

    Args:
        path: the file to write; its folder exists.
        mode: ``"w"``: text in UTF-8, without translated line ends; ``"wb"``: bytes.
        durable: sync the file before it is renamed and the folder afterwards, so that a power cut leaves the old file or the
            new one. The hidden name then includes the process, ``.NAME.PID.part``: two processes may write the same file.

    Yields:
        The open file.

    Raises:
        OSError: from the system.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "summary.json"
        >>> with whole_file(path) as file:
        ...     length = file.write("{}")
        >>> path.read_text()
        '{}'
    """
    path = Path(path)
    process = f".{os.getpid()}" if durable else ""
    part = path.with_name(f".{path.name.lstrip('.')}{process}.part")
    text: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(part, mode, **text) as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if durable:
            replace_durably(part, path)
        else:
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # what stopped the writing stops this as well
            part.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike, text: str, durable: bool = False) -> None:
    """Write a text file whole or not at all, in UTF-8.

    Args:
        path: the file to write; its folder exists.
        text: its contents.
        durable: see :func:`whole_file`.

    Raises:
        OSError: from the system.
    """
    with whole_file(path, durable=durable) as file:
        file.write(text)


def replace_durably(new: Path, old: Path) -> None:
    """Put `new`, which is complete and synced, in the place of `old`, and sync the folder.

    Args:
        new: a file or a folder.
        old: what it replaces; it need not exist.

    Raises:
        OSError: from the system; `old` is unchanged.
    """
    if new.is_dir() and old.is_dir():  # a sharded checkpoint; two directories cannot be swapped atomically
        shutil.rmtree(old)
    os.replace(new, old)
    if os.name != "posix":  # elsewhere directories cannot be opened
        return
    directory = os.open(old.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # some network file systems do not support it
            raise
    finally:
        os.close(directory)


def read_table(path: str | os.PathLike, errors: str = "strict") -> tuple[list[str], list[dict[str, str]]]:
    r"""Read a CSV file whose first row names the columns, such as ``metrics.csv``.

    A last row without a line end is left out: the process was killed while writing, and half a number is a wrong number. Each
    line is a row, so that a quote without its end damages its own row only.

    Args:
        path: the file.
        errors: what to do with bytes that are not UTF-8, as for :meth:`bytes.decode`.

    Returns:
        The names of the columns ([] where the first row is missing), and the rows. A missing cell is empty, and cells
        beyond the last column are left out.

    Raises:
        OSError: from the system.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.csv"
        >>> _ = path.write_text("step,train/loss\n0,2.5\n1,2.")
        >>> read_table(path)
        (['step', 'train/loss'], [{'step': '0', 'train/loss': '2.5'}])
    """
    lines = Path(path).read_bytes().decode("utf-8-sig", errors).split("\n")[:-1]  # after the last line end: a torn row
    cells = [_cells(line) for line in lines if line.strip("\r")]
    if not cells:
        return [], []
    columns, *rows = cells
    return columns, [dict(zip(columns, [*row, *[""] * (len(columns) - len(row))], strict=False)) for row in rows]


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line.removesuffix("\r")]))
    except csv.Error:  # a cell of more than 128 KiB
        return []


def whole_step(text: str) -> int | None:
    """Return a cell of the column ``step`` as a number; None if it is no whole number from 0.

    Example:
        >>> [whole_step(text) for text in ("3", "3.0", "3.5", "-1", "x", "")]
        [3, 3, None, None, None, None]
    """
    try:
        step = float(text)
    except ValueError:
        return None
    return int(step) if step >= 0 and step.is_integer() else None


def write_table(path: str | os.PathLike, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file whole or not at all; its first row names the columns.

    Args:
        path: the file to write; its folder exists.
        columns: the names.
        rows: cells by name; a missing one is left empty.

    Raises:
        OSError: from the system.
    """
    with whole_file(path) as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)
