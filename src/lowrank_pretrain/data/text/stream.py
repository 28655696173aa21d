"""Stream text from the hub or from local files, tokenised and packed while training runs.

For text that is read more than once, ``python -m lowrank_pretrain.data.prepare`` and ``data=tokens`` cost less.
"""

import numpy as np

from lowrank_pretrain.core.checks import whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data.loaders.base import PretrainData, public_name
from lowrank_pretrain.data.loaders.batch import BadInputs
from lowrank_pretrain.data.loaders.stream import StreamLoader
from lowrank_pretrain.data.text.opening import open_documents, read_error
from lowrank_pretrain.data.text.packing import Packer, TextStream
from lowrank_pretrain.data.text.tokenizer import DocumentEncoder, load_tokenizer, vocabulary
from lowrank_pretrain.data.text.tokens import TokenSet

MOST_TOKENS = 1 << 24  # of a sequence: a typing error must not ask for all memory


class TextData(PretrainData):
    """Stream ``{"input_ids": (batch_size, seq_len)}``. An epoch is ``batches_per_epoch`` batches; the stream continues.

    Args:
        root: folder of local files, or one that `datasets` saved with ``save_to_disk``; not used with ``dataset``.
        train_files: glob(s) under ``root``: ``.jsonl``, ``.json``, ``.csv``, ``.parquet``, ``.txt`` or ``.md``, packed
            (``.gz``, ``.bz2``, ``.xz``, ``.zst``) or not. A text file is one document, in the others each row is one.
        val_files: the same for validation.
        dataset: a set on the hub instead, e.g. ``allenai/c4``, or a saved folder.
        config: its configuration, e.g. ``en``.
        train_split: its training split.
        val_split: its validation split.
        text_key: column with the text.
        tokenizer: see :func:`~lowrank_pretrain.data.text.tokenizer.load_tokenizer`.
        end_token: the token after each document; None: as the tokenizer's own files say, or one of the usual ones.
        batch_size: sequences per batch and process.
        num_workers: reading processes.
        seq_len: tokens per sequence.
        vocab_size: of the model, at least the tokenizer's.
        batches_per_epoch: batches of one process that count as an epoch.
        val_sequences: validation reads at most so many, once, and keeps them; all processes share them.
        shuffle_block: sequences shuffled together by one reader; a resumed run tokenises one such block again.
        seed: None: the run's.

    Raises:
        ConfigError: a wrong value, or (from ``setup``) text that is missing or cannot be read.
    """

    def __init__(
        self,
        root: str | None = None,
        train_files: str | list[str] = "train*",
        val_files: str | list[str] = "val*",
        dataset: str | None = None,
        config: str | None = None,
        train_split: str = "train",
        val_split: str = "validation",
        text_key: str = "text",
        tokenizer: str = "gpt2",
        end_token: str | None = None,
        batch_size: int = 16,
        num_workers: int = 2,
        seq_len: int = 1024,
        vocab_size: int = 50257,
        batches_per_epoch: int = 1000,
        val_sequences: int = 1024,
        shuffle_block: int = 1024,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        whole("seq_len", seq_len, 2, most=MOST_TOKENS, allowed=f"must be a whole number, 2 to {MOST_TOKENS:,}")
        whole("batches_per_epoch", batches_per_epoch, 1, "batches")
        whole("val_sequences", val_sequences, 1, "sequences")
        whole("shuffle_block", shuffle_block, 1, "sequences")
        self.train_source = (root, train_files, "train_files", dataset, config, train_split, "train_split")
        self.val_source = (root, val_files, "val_files", dataset, config, val_split, "val_split")
        self.text_key, self.tokenizer_name, self.end_token = text_key, tokenizer, end_token
        self.dataset_name = public_name(dataset or root or "text")
        self.seq_len, self.vocab_size = seq_len, vocab_size
        self.batches_per_epoch, self.val_sequences, self.shuffle_block = batches_per_epoch, val_sequences, shuffle_block

    def setup(self, stage: str | None = None) -> None:
        """Open the text, and read the validation part, once."""
        if self.train_set is not None:
            return
        tokenizer, end = load_tokenizer(self.tokenizer_name, end_token=self.end_token)
        self.remember_tokenizer(self.tokenizer_name, tokenizer, end)
        if vocabulary(tokenizer) > self.vocab_size:
            allowed = f"must be at least {vocabulary(tokenizer)}, the vocabulary of {self.tokenizer_name}"
            raise ConfigError("vocab_size", self.vocab_size, allowed)
        encode = DocumentEncoder(tokenizer, end)
        documents = open_documents(*self.val_source, self.text_key)
        packer = Packer(documents, encode, self.seq_len)
        try:
            rows = packer.rows(self.val_sequences, endless=False)
        except Exception as error:  # one class for each library that reads or unpacks
            raise read_error(error, "val_files", documents.files) from error
        BadInputs().add(packer.take_bad())
        if not len(rows):
            raise ConfigError("seq_len", self.seq_len, "must be at most the tokens of the validation text, which is shorter")
        self.val_set = self.test_set = TokenSet(np.ravel(rows), self.seq_len, self.vocab_size, "validation text")
        rank, world = self.ranks
        self.train_set = TextStream(
            open_documents(*self.train_source, self.text_key),
            "train_files",
            encode,
            self.seq_len,
            batch_size=self.batch_size,
            block=self.shuffle_block,
            rank=rank,
            world_size=world,
            seed=self.seed,
        )

    def _make_train_loader(self) -> StreamLoader:
        if self.train_set is None:
            raise RuntimeError("call TextData.setup() before asking for its loaders")
        return StreamLoader(self.train_set, self.batches_per_epoch, self.num_workers, *self.ranks)
