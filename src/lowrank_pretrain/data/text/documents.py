"""Read documents piece by piece, from local files, a saved set or the hub, starting anywhere and shared among readers.

A piece is a whole document, or a part of a long one, so that memory holds no more than that. Errors are one line.
"""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data.text.files import (
    BLOCK,
    BadRow,
    Blocks,
    Row,
    kind_of,
    rows_of,
    text_of,
)

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

SMALL = 4 * BLOCK  # bytes for each reader; with less, every reader reads all, and they divide the packed sequences
HOPELESS = 1000  # rows without text at the beginning: then it is the wrong column


class Piece(NamedTuple):
    """Hold a part of a document.

    Attributes:
        text: not empty.
        begins: it is the document's first piece, or the text before it is another reader's.
        ends: it is the document's last piece, or the text after it is another reader's.
        after: where reading continues.
    """

    text: str
    begins: bool
    ends: bool
    after: dict[str, Any]


class Documents(Protocol):
    """Describe a source of texts."""

    files: list[Path]  # local ones, to find the one to blame
    bad: list[str]  # rows that were left out and are not reported yet

    def share(self, reader: int, readers: int) -> "Documents | None":
        """Return one reader's share; None if there is too little to divide."""
        ...

    def read(self, place: dict[str, Any] | None) -> Iterator[Piece]:
        """Read all pieces from ``place`` on; None means from the beginning."""
        ...


class _Rows:
    """Read sets of rows: cut long rows into parts, choose the rows of one reader, leave out rows without text."""

    def __init__(self, key: str, text_key: str) -> None:
        self.key, self.text_key = key, text_key
        self.bad: list[str] = []
        self.reader, self.readers = 0, 1

    def _begin_pass(self) -> None:
        self._good, self._left_out, self._first = 0, 0, ""

    def _pieces(self, row: Row, unit: int, skip: int, shift: int, where: str, places: tuple[dict, dict]) -> Iterator[Piece]:
        """Cut this reader's parts from a row; ``places`` are the positions before and after the row."""
        parts = max(1, -(-row.size // BLOCK))
        mine = [(unit + j + shift) % self.readers == self.reader for j in range(parts)]
        if not any(mine):
            return
        try:
            texts = in_parts(row.text(), parts)
        except BadRow as error:
            if mine[0]:
                self._leave_out(f"{where}, row {row.number}, {error}")
            return
        self._good += 1
        if parts == 1 and not texts[0].strip():
            return
        for j, text in enumerate(texts):
            if mine[j] and j >= skip and text:
                begins, ends = j == 0 or not mine[j - 1], j == parts - 1 or not mine[j + 1]
                yield Piece(text, begins, ends, places[1] if j == parts - 1 else {**places[0], "part": j + 1})

    def _leave_out(self, line: str) -> None:
        self._left_out += 1
        self._first = self._first or line
        if len(self.bad) < HOPELESS:  # beyond that, only the number is reported
            self.bad.append(line)
        if not self._good and self._left_out >= HOPELESS:
            raise self._hopeless()

    def _end_pass(self) -> None:
        if not self._good and self._left_out:
            raise self._hopeless()

    def _hopeless(self) -> ConfigError:
        head, has, names = self._first.partition(", it has: ")
        if has:
            return ConfigError(
                "text_key", self.text_key, f"must name a column of text, there are: {names} ({head.split(',')[0]})"
            )
        allowed = f"must name a column of text; none is in the first {self._left_out} rows: {self._first}"
        return ConfigError("text_key", self.text_key, allowed)


class FileDocuments(_Rows):
    """Read local files of one kind. A text file is one document; in all others each row is one.

    Readers share a text file by consecutive blocks. Other files are dealt out whole where the shares are about equal, else row
    by row.

    Args:
        files: the files.
        key: the configuration key that held them.
        text_key: the column with the text.
    """

    def __init__(self, files: list[Path], key: str, text_key: str) -> None:
        super().__init__(key, text_key)
        self.files, self.kind = files, kind_of(files[0], key)
        self.sizes = [path.stat().st_size for path in files]
        self._mine: set[int] | None = None  # numbers of files, None: by rows or blocks

    def share(self, reader: int, readers: int) -> "FileDocuments | None":
        """Return one reader's share; None if there is too little to divide."""
        if sum(self.sizes) < readers * SMALL:
            return None
        part = copy.copy(self)
        part.bad = []
        dealt = _deal(self.sizes, readers) if self.kind != "text" else None
        if dealt is not None:
            part._mine = dealt[reader]
        else:
            part.reader, part.readers = reader, readers
        return part

    def read(self, place: dict[str, Any] | None) -> Iterator[Piece]:
        """Read all pieces from ``place`` on."""
        place = place or {"file": 0}
        self._begin_pass()
        for number in range(place["file"], len(self.files)):
            if self._mine is None or number in self._mine:
                at = place if number == place["file"] else {"file": number}
                yield from (self._blocks if self.kind == "text" else self._file)(at)
        self._end_pass()

    def _blocks(self, place: dict[str, Any]) -> Iterator[Piece]:
        number = place["file"]
        blocks = Blocks(self.files[number], self.key)
        count = blocks.count()

        def is_mine(k: int) -> bool:
            shared = k if count is None else k * self.readers // count  # neighbouring blocks if the count is known
            return (shared + number) % self.readers == self.reader

        try:
            k = place.get("block", 0)
            while count is None or k < count:
                if not is_mine(k):
                    if count is None and blocks.begin(k) is None:
                        return
                    k += 1
                    continue
                found = blocks.text(k)
                if found is None:
                    return
                text, last = found
                ends = last or not is_mine(k + 1)
                after = {"file": number + 1} if last else {"file": number, "block": k + 1}
                if text:
                    yield Piece(text, k == 0 or not is_mine(k - 1), ends, after)
                if last:
                    return
                k += 1
        finally:
            blocks.close()

    def _file(self, place: dict[str, Any]) -> Iterator[Piece]:
        number, unit, skip = place["file"], place.get("unit", 0), place.get("part", 0)
        path = self.files[number]
        before = {"file": number, "at": place.get("at"), "unit": unit}
        for row in rows_of(path, self.kind, self.text_key, self.key, before["at"]):
            unit += max(1, -(-row.size // BLOCK))
            after = {"file": number, "at": row.after, "unit": unit}
            yield from self._pieces(row, before["unit"], skip, number, str(path), (before, after))
            before, skip = after, 0


class SavedDocuments(_Rows):
    """Read a set that `datasets` saved with ``save_to_disk``.

    Args:
        rows: the set.
        folder: the set's folder.
        key: the configuration key that named it.
        text_key: the column with the text.
    """

    def __init__(self, rows: "Dataset", folder: Path, key: str, text_key: str) -> None:
        super().__init__(key, text_key)
        if text_key not in rows.column_names:
            names = ", ".join(sorted(rows.column_names))
            raise ConfigError("text_key", text_key, f"must name a column of text, there are: {names} (in {folder})")
        self.rows, self.folder = rows, folder
        self.files: list[Path] = []

    def share(self, reader: int, readers: int) -> "SavedDocuments | None":
        """Return one reader's share; None if there is too little to divide."""
        if self.rows.data.nbytes < readers * SMALL:
            return None
        part = copy.copy(self)
        part.bad, part.reader, part.readers = [], reader, readers
        return part

    def read(self, place: dict[str, Any] | None) -> Iterator[Piece]:
        """Read all pieces from ``place`` on."""
        place = place or {"row": 0, "unit": 0}
        self._begin_pass()
        unit, skip = place["unit"], place.get("part", 0)
        for i in range(place["row"], len(self.rows)):
            content = {self.text_key: self.rows[i][self.text_key]}
            size = len(content[self.text_key]) if isinstance(content[self.text_key], str) else 0
            row = Row(i + 1, size, partial(text_of, content, self.text_key), None)
            before = {"row": i, "unit": unit}
            unit += max(1, -(-size // BLOCK))
            after = {"row": i + 1, "unit": unit}
            yield from self._pieces(row, before["unit"], skip, 0, str(self.folder), (before, after))
            skip = 0
        self._end_pass()


class HubDocuments(_Rows):
    """Read a set on the hub, in streaming mode.

    Args:
        stream: the set.
        name: its name.
        text_key: the column with the text.
    """

    def __init__(self, stream: "IterableDataset", name: str, text_key: str) -> None:
        super().__init__("dataset", text_key)
        self.stream, self.name = stream, name
        self.files: list[Path] = []

    def share(self, reader: int, readers: int) -> "HubDocuments":
        """Return one reader's share: whole files if there are enough of them, else every n-th document."""
        part = copy.copy(self)
        part.bad = []
        if self.stream.num_shards >= readers:
            part.stream = self.stream.shard(readers, reader, contiguous=False)
        else:
            from datasets.distributed import split_dataset_by_node

            part.stream = split_dataset_by_node(self.stream, rank=reader, world_size=readers)
        return part

    def read(self, place: dict[str, Any] | None) -> Iterator[Piece]:
        """Read all pieces from ``place`` on."""
        place = place or {"documents": None}
        self._begin_pass()
        self.stream.load_state_dict(place["documents"])
        before, skip = place["documents"], place.get("part", 0)
        # `iter` leaves the sharding among workers to us
        for number, batch in enumerate(self.stream.iter(batch_size=1), 1):
            after = self.stream.state_dict()
            content = {key: values[0] for key, values in batch.items()}
            text = content.get(self.text_key)
            row = Row(number, len(text) if isinstance(text, str) else 0, partial(text_of, content, self.text_key), None)
            yield from self._pieces(row, 0, skip, 0, self.name, ({"documents": before}, {"documents": after}))
            before, skip = after, 0
        self._end_pass()


def in_parts(text: str, count: int) -> list[str]:
    """Cut a text into parts of about the same length, at ends of lines, else before spaces, else anywhere.

    Example:
        >>> in_parts("one two three four", 2)
        ['one two t', 'hree four']
    """
    cuts = [0]
    for i in range(1, count):
        at = len(text) * i // count
        window = text[at : at + max(1, len(text) // (2 * count))]
        line = next((j + 1 for j in range(len(window) - 1) if window[j] == "\n" and not window[j + 1].isspace()), 0)
        cuts.append(at + (line or max(0, window.find(" "))))
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _deal(sizes: list[int], readers: int) -> list[set[int]] | None:
    """Deal numbers of files to the readers, the largest first, to the one with least; None if shares differ too much."""
    if len(sizes) < readers:
        return None
    hands: list[set[int]] = [set() for _ in range(readers)]
    loads = [0] * readers
    for number in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        hands[least].add(number)
        loads[least] += sizes[number]
    return hands if min(loads) >= 0.7 * max(loads) else None
