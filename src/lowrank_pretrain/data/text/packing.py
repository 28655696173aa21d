"""Pack documents into sequences of equal length, shuffled in blocks, resumable at any batch.

The content of a shuffle buffer cannot be saved cheaply, so we shuffle in blocks: read ``block`` sequences, hand them out in a
random order, read the next block. The state is where the block began and how much of it is done; resuming reads
that one block again. Between two blocks at most the end of one piece of text is left over, because older tokens always go into
the first sequence that the piece helps to fill.

Shapes: B batch, T tokens (``seq_len``).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from lowrank_pretrain.core.agreement import generator
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data.loaders.batch import Fetched
from lowrank_pretrain.data.text.documents import Documents
from lowrank_pretrain.data.text.opening import read_error
from lowrank_pretrain.data.text.tokenizer import DocumentEncoder


class Packer:
    """Cut documents into an endless series of sequences, with a state at the beginning of each block.

    Args:
        documents: this reader's share, or all of them where readers divide the sequences.
        encode: text -> ids.
        seq_len: T.
        state: of an earlier packer, to continue from.
        reader: take the sequences whose number, divided by `readers`, leaves this remainder.
        readers: how many readers divide the sequences.
    """

    def __init__(
        self,
        documents: Documents,
        encode: DocumentEncoder,
        seq_len: int,
        state: dict[str, Any] | None = None,
        reader: int = 0,
        readers: int = 1,
    ) -> None:
        self.documents, self.encode, self.seq_len = documents, encode, seq_len
        self.reader, self.readers = reader, readers
        if state is not None and "made" not in state:
            allowed = "is of another version of this package, whose place in the text means nothing here; start the run afresh"
            raise ConfigError("ckpt_path", "a checkpoint", allowed)
        self._open(state["before"] if state else None)
        self._before = self._at
        self._pass_tokens: int | None = 0  # since the pass began; None: not known, because reading began inside it
        self._left: list[int] = []  # tokens not yet used, at a block's beginning the end of one piece
        self._made = state["made"] if state else 0  # sequences of all readers so far
        if state and state["tail"] is not None:
            piece = self._next_piece() or []
            self._left = piece[len(piece) - state["tail"] :]
            self._pass_tokens = None

    def state(self, fresh: bool = False) -> dict[str, Any]:
        """Return the start of the next sequence: a number of tokens from the end of the piece after ``before``."""
        return {"before": self._before, "tail": None if fresh else len(self._left), "made": self._made}

    def rows(self, count: int, endless: bool = True) -> np.ndarray:
        """Return the next ``count`` sequences, (count, T) uint32; fewer if not endless and the text is at its end.

        Raises:
            ConfigError: endless, and a whole pass over the documents holds less than T tokens.
        """
        rows = np.empty((count, self.seq_len), np.uint32)
        filled = 0
        while True:
            filled += self._cut(rows[filled:])
            if filled == count:
                return rows
            piece = self._next_piece()
            if piece is not None:
                self._left += piece
                continue
            if not endless:
                return rows[:filled]
            if self._pass_tokens is not None and self._pass_tokens < self.seq_len:
                allowed = f"must be at most {self._pass_tokens}, the tokens of one reader's text; or lower data.num_workers"
                raise ConfigError("seq_len", self.seq_len, allowed)
            self._open(None)
            self._pass_tokens = 0

    def take_bad(self) -> list[str]:
        """Return a line for each row that was left out since the last call."""
        taken, self.documents.bad = self.documents.bad, []
        return taken

    def _cut(self, rows: np.ndarray) -> int:
        """Cut sequences from the tokens that are left, write this reader's into ``rows``, and return their number."""
        whole = len(self._left) // self.seq_len
        first = (self.reader - self._made) % self.readers  # the first of the next sequences that is ours
        ours = min(len(rows), len(range(first, whole, self.readers)))
        used = whole if ours < len(rows) else first + (ours - 1) * self.readers + 1
        made = np.reshape(np.array(self._left[: used * self.seq_len], np.uint32), (used, self.seq_len))
        rows[:ours] = made[first :: self.readers]
        self._left, self._made = self._left[used * self.seq_len :], self._made + used
        return ours

    def _open(self, place: dict[str, Any] | None) -> None:
        self._pieces, self._at = self.documents.read(place), place  # None: from the first document

    def _next_piece(self) -> list[int] | None:
        piece = next(self._pieces, None)
        if piece is None:
            return None
        self._before, self._at = self._at, piece.after
        ids = self.encode(piece.text, piece.begins, piece.ends)
        if self._pass_tokens is not None:
            self._pass_tokens += len(ids)
        return ids


class TextStream(IterableDataset):
    """Stream batches ``{"input_ids": (B, T) int64}`` without end.

    Args:
        documents: all of them; divided here among ranks and workers.
        files_key: the configuration key that held their files.
        encode: text -> ids.
        seq_len: T.
        batch_size: B.
        block: sequences shuffled together; rounded up to whole batches.
        rank: this process.
        world_size: number of processes.
        seed: the run's.
    """

    def __init__(
        self,
        documents: Documents,
        files_key: str,
        encode: DocumentEncoder,
        seq_len: int,
        batch_size: int,
        block: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
    ) -> None:
        self.documents, self.files_key, self.encode = documents, files_key, encode
        self.seq_len, self.batch_size = seq_len, batch_size
        self.block = -(-block // batch_size) * batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self._place: dict[str, Any] = {"block": 0, "done": 0, "begin": None}

    def state_dict(self) -> dict[str, Any]:
        """Return where the current block began in the documents, and how many of its sequences are used."""
        return dict(self._place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin the next iteration at ``state``."""
        self._place = dict(state)

    def __iter__(self) -> Iterator[Fetched]:
        worker = get_worker_info()
        workers = worker.num_workers if worker else 1
        reader, readers = self.rank * workers + (worker.id if worker else 0), self.world_size * workers
        try:
            number, done, begin = self._place["block"], self._place["done"], self._place["begin"]
            part = self.documents.share(reader, readers) if readers > 1 else self.documents
            divided = (reader, readers) if part is None else (0, 1)  # too little text: every reader reads all of it
            packer = Packer(part or self.documents, self.encode, self.seq_len, begin, *divided)
            while True:
                begin = begin or packer.state(fresh=True)
                rows = packer.rows(self.block)
                order = torch.randperm(self.block, generator=generator("block", reader, number, seed=self.seed)).numpy()
                for first in range(done, self.block, self.batch_size):
                    ids = rows[order[first : first + self.batch_size]].astype(np.int64)
                    self._place = {"block": number, "done": first + self.batch_size, "begin": begin}
                    yield Fetched({"input_ids": torch.from_numpy(ids)}, packer.take_bad())
                number, done, begin = number + 1, 0, packer.state()
        except Exception as error:  # carried to the training process, where it is raised
            yield Fetched(None, [], read_error(error, self.files_key, self.documents.files))
