r"""Tokenise text once: local files or a hub set -> ``train.bin`` and ``val.bin`` for ``data=tokens``.

    python -m lowrank_pretrain.data.prepare --out tokens --tokenizer gpt2 --root text --files '*.jsonl.gz'
    python -m lowrank_pretrain.data.prepare --out tokens --tokenizer gpt2 --dataset abisee/cnn_dailymail --config 3.0.0 \
        --text-key article
    python -m lowrank_pretrain.data.prepare --out tokens --train-bpe 8192 --root text --files '*.txt'

``--tokenizer``: ``kjv`` (embedded), a ``tokenizer.json``, a folder with one or with GPT-2's two BPE files, or a name on the
hub. ``--train-bpe N`` trains a byte-level BPE on the same text instead. Either is kept as ``OUT/tokenizer.json``.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lowrank_pretrain.core.arguments import as_flags, command_parser, print_counts
from lowrank_pretrain.core.checks import whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.files import write_whole
from lowrank_pretrain.data.checksums import SUMS
from lowrank_pretrain.data.loaders.batch import BadInputs
from lowrank_pretrain.data.text.bins import open_bin, write_bin
from lowrank_pretrain.data.text.documents import Piece
from lowrank_pretrain.data.text.opening import open_documents, read_error
from lowrank_pretrain.data.text.tokenizer import DocumentEncoder, load_tokenizer, special_tokens, train_bpe, vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CHUNK = 1 << 20  # tokens that are copied at a time


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
    end_token: str | None = None,
) -> dict[str, int]:
    """Write ``train.bin`` and ``val.bin`` under ``out``; each document is followed by the end-of-document token.

    Args:
        out: folder, made if missing.
        tokenizer: see :func:`~lowrank_pretrain.data.text.tokenizer.load_tokenizer`; this or ``train_bpe_vocab``.
        train_bpe_vocab: train a tokenizer of so many tokens on the text first.
        root: folder of local files.
        files: glob(s) below it. Each ``.txt`` or ``.md`` is one document.
        dataset: a set on the hub, instead of local files.
        config: its configuration.
        split: its split.
        text_key: column with the text.
        val_every: one document in so many goes to ``val.bin``; of fewer documents, the same share of the tokens, from the end.
        end_token: the token after each document; None: see :func:`~lowrank_pretrain.data.text.tokenizer.load_tokenizer`.

    Returns:
        The number of tokens by split.

    Raises:
        ConfigError: a wrong value, or text that cannot be read; files of an earlier run are then left as they were.
    """
    if (tokenizer is None) == (train_bpe_vocab is None):
        raise ConfigError("tokenizer", tokenizer, "must be given, or train_bpe, and not both")
    if train_bpe_vocab is not None:
        whole("train_bpe", train_bpe_vocab, 257, allowed="must be at least 257: every byte and the end of a document")
    whole("val_every", val_every, 2, allowed="must be 2 or more")

    source, bad = open_documents(root, files, "files", dataset, config, split, "split", text_key), BadInputs()

    def pieces() -> Iterator[tuple[bool, Piece]]:
        number = 1
        try:
            for piece in source.read(None):
                yield number % val_every == 0, piece
                number += piece.ends
                bad.add(source.bad)
                source.bad.clear()
        except Exception as error:  # one class for each library that reads or unpacks
            raise read_error(error, "files", source.files) from error
        bad.add(source.bad)

    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    if train_bpe_vocab is not None:
        trained = train_bpe((piece.text for held_out, piece in pieces() if not held_out), train_bpe_vocab)
        trained.save(str(out / "trained.json"), pretty=False)
        (out / "tokenizer_config.json").unlink(missing_ok=True)  # of an earlier run's tokenizer
        (out / "trained.json").replace(out / "tokenizer.json")
    name = str(out / "tokenizer.json") if tokenizer is None else tokenizer
    encoder, end = load_tokenizer(name, end_token=end_token)
    counts = _write(out, pieces(), DocumentEncoder(encoder, end), vocabulary(encoder), val_every)
    (out / SUMS).unlink(missing_ok=True)  # of a corpus that lay here
    _keep_tokenizer(out, name, encoder, end)
    return counts


def _write(
    out: Path, pieces: Iterator[tuple[bool, Piece]], encode: DocumentEncoder, vocab_size: int, val_every: int
) -> dict[str, int]:
    """Write both token files. What is held out waits in a file without a name, so that the text is read once."""
    with tempfile.TemporaryFile(dir=out) as held:

        def train() -> Iterator[list[int]]:
            for held_out, piece in pieces:
                ids = encode(piece.text, piece.begins, piece.ends)
                if held_out:
                    held.write(np.array(ids, np.uint32).tobytes())
                else:
                    yield ids

        count = write_bin(out / "train.bin", train(), vocab_size)
        if held.tell():
            held.seek(0)
            chunks = (np.frombuffer(chunk, np.uint32) for chunk in iter(lambda: held.read(4 * CHUNK), b""))
            return {"train": count, "val": write_bin(out / "val.bin", chunks, vocab_size)}
    if not count:
        return {"train": count, "val": write_bin(out / "val.bin", [], vocab_size)}
    tokens, _ = open_bin(out / "train.bin")
    cut = count - max(1, count // val_every)
    val = write_bin(out / "val.bin", [tokens[cut:]], vocab_size)
    return {
        "train": write_bin(out / "train.bin", (tokens[i : min(i + CHUNK, cut)] for i in range(0, cut, CHUNK)), vocab_size),
        "val": val,
    }


def _keep_tokenizer(out: Path, name: str, encoder: "Tokenizer", end: int) -> None:
    """Write ``tokenizer.json`` and its special tokens next to the token files: an export of a model takes them along."""
    special = special_tokens(name, encoder)
    ids = {"eos_token": end, "bos_token": special.bos, "pad_token": special.pad}
    encoder.save(str(out / "tokenizer.json"), pretty=False)
    named = {key: encoder.id_to_token(token) for key, token in ids.items() if token is not None}
    write_whole(out / "tokenizer_config.json", json.dumps(named, indent=2, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code, 2 for a wrong value."""
    parser = command_parser("data.prepare", __doc__)
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
    parser.add_argument("--end-token")
    args = vars(parser.parse_args(as_flags(argv, parser)))
    return print_counts(lambda: prepare(**args), lambda split, count: f"{Path(args['out']) / split}.bin: {count:,} tokens")


if __name__ == "__main__":
    sys.exit(main())
