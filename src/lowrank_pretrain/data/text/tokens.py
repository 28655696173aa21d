"""Load token files as language-modelling batches. Shapes: B batch, T tokens (``seq_len``)."""

from pathlib import Path

import numpy as np
import torch

from lowrank_pretrain.core.agreement import generator
from lowrank_pretrain.core.checks import whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data import SAMPLES
from lowrank_pretrain.data.checksums import check_sums
from lowrank_pretrain.data.loaders.base import PretrainData, public_name
from lowrank_pretrain.data.loaders.batch import Fetched
from lowrank_pretrain.data.text.bins import check_ids, open_bin
from lowrank_pretrain.data.text.tokenizer import load_tokenizer


class TokenSet:
    """Cut tokens into consecutive pieces of T; the text is a ring, so pieces can begin anywhere.

    Args:
        tokens: ids, (count,), any unsigned type; a memmap is read only where needed.
        seq_len: T.
        vocab_size: every id must be below it.
        path: the file to name in errors.
        jitter: begin every epoch at another token, so that pieces are cut elsewhere.
        seed: the run's seed; None: the one given to ``seed_everything``.

    Raises:
        ConfigError: ``seq_len`` longer than the text.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        vocab_size: int,
        path: str | Path,
        jitter: bool = False,
        seed: int | None = None,
    ) -> None:
        whole("seq_len", seq_len, 2, most=len(tokens), allowed=f"must be from 2 to {len(tokens)}, the tokens in {path}")
        self.tokens, self.seq_len, self.vocab_size, self.path = tokens, seq_len, vocab_size, path
        self.jitter, self.seed = jitter, seed

    def __len__(self) -> int:
        return len(self.tokens) // self.seq_len

    def fetch(self, epoch: int, indices: list[int]) -> Fetched:
        """Return the batch ``{"input_ids": (B, T) int64}``."""
        start = np.asarray(indices) * self.seq_len
        if self.jitter:
            draw = torch.randint(len(self.tokens), (), generator=generator("jitter", epoch, seed=self.seed))
            start = start + draw.item()
        ids = self.tokens[(start[:, None] + np.arange(self.seq_len)) % len(self.tokens)]  # (B, T)
        check_ids(ids, self.vocab_size, self.path)
        return Fetched({"input_ids": torch.from_numpy(ids.astype(np.int64))}, [])


class TokenData(PretrainData):
    """Load language-modelling batches from token files (:mod:`lowrank_pretrain.data.text.bins`).

    Args:
        root: folder with ``train.bin`` and ``val.bin``, or ``kjv`` for the embedded King James text.
        batch_size: sequences per batch and process.
        num_workers: loading processes; 0 is the fastest from a local disk.
        seq_len: tokens per sequence, T.
        vocab_size: of the model; at least that of the files.
        train_file: training tokens, a path under ``root``.
        val_file: validation tokens, a path under ``root``.
        seed: None: the run's.
        test_file: tokens to test on, a path under ``root``; None: the validation tokens.

    Raises:
        ConfigError: a wrong value, or (from ``setup``) a file that is missing, does not fit, or is not the one that
            ``SHA256SUMS`` names.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seq_len: int = 1024,
        vocab_size: int = 50257,
        train_file: str = "train.bin",
        val_file: str = "val.bin",
        seed: int | None = None,
        test_file: str | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.root, self.seq_len, self.vocab_size = root, seq_len, vocab_size
        self.train_file, self.val_file, self.test_file = train_file, val_file, test_file
        self.dataset_name = "King James Bible" if root == "kjv" else public_name(root or "tokens")

    def setup(self, stage: str | None = None) -> None:
        """Open the files, once."""
        if self.train_set is not None:
            return
        if self.root == "kjv":
            paths = {"train_file": SAMPLES / "kjv_train.bin", "val_file": SAMPLES / "kjv_val.bin"}
        else:
            if not self.root or not Path(self.root).is_dir():
                files = f"{self.train_file} and {self.val_file}"
                made = "`python -m lowrank_pretrain.data.prepare` (for data=docs_corpus: `.data.corpus`)"
                raise ConfigError("root", self.root, f"must be a folder with {files}, written by {made}")
            names = {"train_file": self.train_file, "val_file": self.val_file, "test_file": self.test_file}
            paths = {key: Path(self.root) / name for key, name in names.items() if name is not None}
        sets = {}
        for key, path in paths.items():
            tokens, _ = open_bin(path, self.vocab_size, key)
            args = tokens, self.seq_len, self.vocab_size, path
            sets[key] = TokenSet(*args, jitter=key == "train_file", seed=self.seed)
        if self.root != "kjv":
            check_sums(Path(str(self.root)), {path.name: path for path in paths.values()}, "root")
        self.train_set, self.val_set = sets["train_file"], sets["val_file"]
        self.test_set = sets.get("test_file", self.val_set)
        tokenizer = "kjv" if self.root == "kjv" else str(Path(self.root) / "tokenizer.json")
        if self.root == "kjv" or Path(tokenizer).is_file():  # left there by prepare
            self.remember_tokenizer(tokenizer, *load_tokenizer(tokenizer))
