"""Byte-level BPE tokenizers, all through the `tokenizers` library: read from files, from the hub, or trained."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_pretrain.data import SAMPLES
from lowrank_pretrain.data.sources import first_line
from lowrank_pretrain.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOT = "<|endoftext|>"
END_NAMES = (EOT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")  # GPT-2, LLaMA and T5, LLaMA 3, Gemma, BERT
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # the same two files under both names


def train_bpe(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """A GPT-2-like byte-level BPE of ``vocab_size`` tokens; id 0 is ``<|endoftext|>``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that any text can be encoded
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(name: str, key: str = "tokenizer") -> tuple["Tokenizer", int]:
    """A tokenizer and the id that ends a document.

    Args:
        name: ``kjv`` (embedded), a ``tokenizer.json``, a folder with one or with GPT-2's two BPE files
            (``vocab.json`` + ``merges.txt`` or ``encoder.json`` + ``vocab.bpe``), or a name on the Hugging Face hub.
        key: the configuration key to blame.

    Returns:
        The tokenizer and the id of its end-of-document token.

    Raises:
        ConfigError: nothing of the kind, unreadable, or without an end-of-document token.
    """
    from tokenizers import Tokenizer

    path = SAMPLES / "kjv_tokenizer.json" if name == "kjv" else Path(name)
    try:
        if path.is_file():
            tokenizer = Tokenizer.from_file(str(path))
        elif (path / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        elif path.is_dir():
            tokenizer = _gpt2(path, key)
        else:
            tokenizer = Tokenizer.from_pretrained(name)
    except ConfigError:
        raise
    except Exception as error:  # the library raises bare Exception for a broken file and for a missing network
        allowed = "must be kjv, a tokenizer.json, a folder with one or with GPT-2's BPE files, or a name on the hub"
        raise ConfigError(key, str(name), f"{allowed} ({first_line(error)})") from error
    for end in END_NAMES:
        if (index := tokenizer.token_to_id(end)) is not None:
            return tokenizer, index
    raise ConfigError(key, str(name), f"must have an end-of-document token, one of {', '.join(END_NAMES)}")


def _gpt2(folder: Path, key: str) -> "Tokenizer":
    """GPT-2's tokenizer from its two BPE files."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    for vocab, merges in GPT2_FILES:
        if (folder / vocab).is_file() and (folder / merges).is_file():
            tokenizer = Tokenizer(models.BPE.from_file(str(folder / vocab), str(folder / merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            tokenizer.add_special_tokens([AddedToken(EOT, special=True)])
            return tokenizer
    wanted = " or ".join(f"{vocab} + {merges}" for vocab, merges in GPT2_FILES)
    raise ConfigError(key, str(folder), f"must hold tokenizer.json, {wanted}")
