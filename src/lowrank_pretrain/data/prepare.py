r"""Tokenise text once: local files or a hub set -> ``train.bin`` and ``val.bin`` for ``data=tokens``.

    python -m lowrank_pretrain.data.prepare --out tokens --tokenizer gpt2 --root text --files '*.jsonl.gz'
    python -m lowrank_pretrain.data.prepare --out tokens --tokenizer gpt2 --dataset abisee/cnn_dailymail --config 3.0.0 \
        --text-key article
    python -m lowrank_pretrain.data.prepare --out tokens --train-bpe 8192 --root text --files '*.txt'

``--tokenizer``: ``kjv`` (embedded), a ``tokenizer.json``, a folder with one or with GPT-2's two BPE files, or a name on the
hub. ``--train-bpe N`` trains a byte-level BPE on the same text instead and keeps it as ``OUT/tokenizer.json``.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lowrank_pretrain.arguments import as_flags
from lowrank_pretrain.data.bins import open_bin, write_bin
from lowrank_pretrain.data.documents import open_documents, read_error, texts
from lowrank_pretrain.data.tokenizer import load_tokenizer, train_bpe
from lowrank_pretrain.errors import ConfigError


def prepare(
    out: str | Path,
    tokenizer: str | None = None,
    train_bpe_vocab: int | None = None,
    root: str | None = None,
    files: str | list[str] = "*",
    dataset: str | None = None,
    config: str | None = None,
    split: str = "train",
    text_key: str = "text",
    val_every: int = 100,
) -> dict[str, int]:
    """Write ``train.bin`` and ``val.bin`` under ``out``; each document is followed by the end-of-document token.

    Args:
        out: folder, made if missing.
        tokenizer: see :func:`~lowrank_pretrain.data.tokenizer.load_tokenizer`; this or ``train_bpe_vocab``.
        train_bpe_vocab: train a tokenizer of so many tokens on the text first.
        root: folder of local files.
        files: glob(s) below it. Each ``.txt`` is one document.
        dataset: a set on the hub instead.
        config: its configuration.
        split: its split.
        text_key: column with the text.
        val_every: every so-many-th document goes to ``val.bin``; of fewer documents, the last share of the tokens.

    Returns:
        The number of tokens by split.

    Raises:
        ConfigError: a wrong value or text that cannot be read; files from an earlier run are then as they were.
    """
    if (tokenizer is None) == (train_bpe_vocab is None):
        raise ConfigError("tokenizer", tokenizer, "must be given, or train_bpe, and not both")
    if train_bpe_vocab is not None and train_bpe_vocab < 257:
        raise ConfigError("train_bpe", train_bpe_vocab, "must be at least 257: every byte and the end of a document")
    if val_every < 2:
        raise ConfigError("val_every", val_every, "must be 2 or more")

    def documents() -> Iterator[tuple[bool, str]]:
        stream, paths = open_documents(root, files, "files", dataset, config, split, "split")
        try:
            for number, text in enumerate(texts(stream, text_key), 1):
                yield number % val_every == 0, text
        except Exception as error:  # one class for each library below `datasets`
            raise read_error(error, "files", paths) from error

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if train_bpe_vocab is not None:
        trained = train_bpe((text for held_out, text in documents() if not held_out), train_bpe_vocab)
        trained.save(str(out / "tokenizer.json"), pretty=False)
        tokenizer = str(out / "tokenizer.json")
    encoder, end = load_tokenizer(tokenizer)
    vocab_size = encoder.get_vocab_size()
    val: list[np.ndarray] = []  # kept in memory, so that the text is read once

    def train() -> Iterator[np.ndarray]:
        for held_out, text in documents():
            ids = np.array([*encoder.encode(text).ids, end], np.uint32)
            if held_out:
                val.append(ids)
            else:
                yield ids

    count = write_bin(out / "train.bin", train(), vocab_size)
    if not val and count:
        tokens, _ = open_bin(out / "train.bin")
        cut = count - max(1, count // val_every)
        val = [tokens[cut:]]
        count = write_bin(out / "train.bin", [tokens[:cut]], vocab_size)
    return {"train": count, "val": write_bin(out / "val.bin", val, vocab_size)}


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for a wrong value."""
    parser = argparse.ArgumentParser(
        prog="python -m lowrank_pretrain.data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--train-bpe", type=int, dest="train_bpe_vocab", metavar="N")
    parser.add_argument("--root")
    parser.add_argument("--files", nargs="+", default="*")
    parser.add_argument("--dataset")
    parser.add_argument("--config")
    parser.add_argument("--split", default="train")
    parser.add_argument("--text-key", default="text")
    parser.add_argument("--val-every", type=int, default=100)
    args = vars(parser.parse_args(as_flags(argv, parser)))
    try:
        counts = prepare(**args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for part, count in counts.items():
        print(f"{Path(args['out']) / part}.bin: {count:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
