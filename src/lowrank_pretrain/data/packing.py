"""Documents -> tokens -> sequences of equal length, shuffled in blocks, resumable at any batch.

A shuffle buffer's content cannot be saved cheaply, so we shuffle in blocks: read ``block`` sequences, hand them out in a
random order, read the next block. The state is where the block began, and how much of it is done; resuming reads that
one block again. Between two blocks at most the end of one document is left over: older tokens always went into the first
sequence that it helped to fill.

Shapes: B batch, T tokens (``seq_len``).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from lowrank_pretrain.data.documents import read_error, texts
from lowrank_pretrain.data.fetching import Fetched
from lowrank_pretrain.errors import ConfigError
from lowrank_pretrain.seeds import generator

if TYPE_CHECKING:
    import datasets
    from tokenizers import Tokenizer


class Packer:
    """An endless run of sequences over a streaming set of documents, with a state at each block's beginning.

    Args:
        documents: a set in streaming mode, already this reader's share.
        text_key: column with the text.
        tokenizer: text -> ids.
        end: id after each document.
        seq_len: T.
        state: of an earlier packer, to go on from.
    """

    def __init__(
        self,
        documents: "datasets.IterableDataset",
        text_key: str,
        tokenizer: "Tokenizer",
        end: int,
        seq_len: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self.documents, self.text_key = documents, text_key
        self.tokenizer, self.end, self.seq_len = tokenizer, end, seq_len
        self._open(state["before"] if state else None)
        self._before = self._at
        self._pass_tokens: int | None = 0  # since the pass began; None: not known, because we came in on the way
        self._left: list[int] = []  # tokens not yet used, at a block's beginning the end of one document
        if state and state["tail"] is not None:
            document = self._next_document() or []
            self._left = document[len(document) - state["tail"] :]
            self._pass_tokens = None

    def state(self, fresh: bool = False) -> dict[str, Any]:
        """Where the next sequence begins: so many tokens from the end of the document after ``before``."""
        return {"before": self._before, "tail": None if fresh else len(self._left)}

    def rows(self, count: int, endless: bool = True) -> np.ndarray:
        """The next ``count`` sequences, (count, T) uint32; fewer if not endless and the text is at its end.

        Raises:
            ConfigError: endless, and a whole pass over the documents holds less than T tokens.
        """
        rows = np.empty((count, self.seq_len), np.uint32)
        filled = 0
        while True:
            new = min(count - filled, len(self._left) // self.seq_len)
            rows[filled : filled + new] = np.reshape(self._left[: new * self.seq_len], (new, self.seq_len))
            filled += new
            self._left = self._left[new * self.seq_len :]
            if filled == count:
                return rows
            document = self._next_document()
            if document is not None:
                self._left += document
                continue
            if not endless:
                return rows[:filled]
            if self._pass_tokens is not None and self._pass_tokens < self.seq_len:
                raise ConfigError(
                    "seq_len", self.seq_len, f"must be at most {self._pass_tokens}, the tokens of one reader's text"
                )
            self._open(None)
            self._pass_tokens = 0

    def _open(self, state: Any) -> None:
        self.documents.load_state_dict(state)  # None: from the first document
        self._texts, self._at = texts(self.documents, self.text_key), state

    def _next_document(self) -> list[int] | None:
        text = next(self._texts, None)
        if text is None:
            return None
        self._before, self._at = self._at, self.documents.state_dict()
        ids = [*self.tokenizer.encode(text).ids, self.end]
        if self._pass_tokens is not None:
            self._pass_tokens += len(ids)
        return ids


class TextStream(IterableDataset):
    """An endless stream of batches ``{"input_ids": (B, T) int64}``.

    Args:
        documents: a set in streaming mode, whole; split here among ranks and workers.
        files: its local files, to find the one to blame.
        files_key: the configuration key that held them.
        text_key: column with the text.
        tokenizer: text -> ids.
        end: id after each document.
        seq_len: T.
        batch_size: B.
        block: sequences shuffled together; rounded up to whole batches.
        rank: this process.
        world_size: number of processes.
        seed: the run's.
    """

    def __init__(
        self,
        documents: "datasets.IterableDataset",
        files: list[Path],
        files_key: str,
        text_key: str,
        tokenizer: "Tokenizer",
        end: int,
        seq_len: int,
        batch_size: int,
        block: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
    ) -> None:
        self.documents, self.files, self.files_key, self.text_key = documents, files, files_key, text_key
        self.tokenizer, self.end, self.seq_len, self.batch_size = tokenizer, end, seq_len, batch_size
        self.block = -(-block // batch_size) * batch_size
        self.rank, self.world_size, self.seed = rank, world_size, seed
        self._place: dict[str, Any] = {"block": 0, "done": 0, "begin": None}

    def state_dict(self) -> dict[str, Any]:
        """Where the current block began in the documents, and the sequences used of it."""
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
            documents = share(self.documents, reader, readers)
            packer = Packer(documents, self.text_key, self.tokenizer, self.end, self.seq_len, begin)
            while True:
                begin = begin or packer.state(fresh=True)
                rows = packer.rows(self.block)
                order = torch.randperm(self.block, generator=generator("block", reader, number, seed=self.seed)).numpy()
                for first in range(done, self.block, self.batch_size):
                    ids = rows[order[first : first + self.batch_size]].astype(np.int64)
                    self._place = {"block": number, "done": first + self.batch_size, "begin": begin}
                    yield Fetched({"input_ids": torch.from_numpy(ids)}, [])
                number, done, begin = number + 1, 0, packer.state()
        except Exception as error:  # carried to the training process, where it is raised
            yield Fetched(None, [], read_error(error, self.files_key, self.files))


def share(documents: "datasets.IterableDataset", reader: int, readers: int) -> "datasets.IterableDataset":
    """One reader's share: files of its own where there are enough of them, else every so-many-th document."""
    if readers == 1:
        return documents
    if documents.num_shards >= readers:
        return documents.shard(readers, reader, contiguous=False)
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(documents, rank=reader, world_size=readers)
