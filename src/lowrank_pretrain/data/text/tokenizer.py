"""Load or train tokenizers, all through the `tokenizers` library: from files, from the hub, or from text."""

import json
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.core.text import first_line
from lowrank_pretrain.data import SAMPLES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOT = "<|endoftext|>"
END_NAMES = (EOT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")  # GPT-2, LLaMA and T5, LLaMA 3, Gemma, BERT
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # the same two files under both names


def train_bpe(texts: Iterable[str], vocab_size: int) -> "Tokenizer":
    """Train a GPT-2-like byte-level BPE of ``vocab_size`` tokens; id 0 is ``<|endoftext|>``."""
    with optional_import("vocab_size", vocab_size):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that any text can be encoded
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Special(NamedTuple):
    """Hold a tokenizer's origin and its special ids; None for what it does not have.

    Attributes:
        file: its ``tokenizer.json``, if there is one.
        folder: the folder of its other files.
        bos: id that begins a document.
        pad: id of padding.
    """

    file: Path | None
    folder: Path | None
    bos: int | None
    pad: int | None


def load_tokenizer(name: str, key: str = "tokenizer", end_token: str | None = None) -> tuple["Tokenizer", int]:
    """Load a tokenizer and the id that ends a document.

    Truncation and padding, which a ``tokenizer.json`` may ask for, are switched off: they are meant for batches of a model, and
    would cut documents.

    Args:
        name: ``kjv`` (embedded), a ``tokenizer.json``, a folder with one or with GPT-2's two BPE files
            (``vocab.json`` + ``merges.txt`` or ``encoder.json`` + ``vocab.bpe``), or a name on the Hugging Face hub.
        key: the configuration key to blame.
        end_token: the token that ends a document. None: the ``eos_token`` of ``tokenizer_config.json`` or of
            ``special_tokens_map.json`` next to the tokenizer, else the first of the usual ones that it has.

    Returns:
        The tokenizer and the id of its end-of-document token.

    Raises:
        ConfigError: no such tokenizer, an unreadable one, or one without an end-of-document token.
    """
    with optional_import(key, name):
        from tokenizers import Tokenizer

    path = SAMPLES / "kjv_tokenizer.json" if name == "kjv" else Path(name)
    try:
        if path.is_file():
            tokenizer = Tokenizer.from_file(str(path))
        elif (path / "tokenizer.json").is_file():
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        elif path.is_dir():
            tokenizer = _converted(path) or _gpt2(path, key)
        else:
            tokenizer = Tokenizer.from_pretrained(name)
    except ConfigError:
        raise
    except Exception as error:  # the library raises bare Exception for a broken file and for a missing network
        allowed = "must be kjv, a tokenizer.json, a folder with one or with GPT-2's BPE files, or a name on the hub"
        raise ConfigError(key, str(name), f"{allowed} ({first_line(error)})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if end_token is not None:
        if (index := tokenizer.token_to_id(end_token)) is None:
            raise ConfigError("end_token", end_token, f"must be a token of {name}, it has none of that name")
        return tokenizer, index
    for end in (_named(name, "eos_token"), *END_NAMES):
        if end is not None and (index := tokenizer.token_to_id(end)) is not None:
            return tokenizer, index
    allowed = f"must have an end-of-document token, one of {', '.join(END_NAMES)}; name another with data.end_token"
    raise ConfigError(key, str(name), allowed)


def special_tokens(name: str, tokenizer: "Tokenizer") -> Special:
    """Return the local files of the tokenizer ``name``, and its other special ids."""
    path = SAMPLES / "kjv_tokenizer.json" if name == "kjv" else Path(name)
    folder = path if path.is_dir() else path.parent if path.is_file() and name != "kjv" else None
    if path.is_dir():
        path = path / "tokenizer.json"
    elif not path.is_file():
        path = _of_hub(name, "tokenizer.json") or path
    ids = [tokenizer.token_to_id(token) if token else None for token in (_named(name, "bos_token"), _named(name, "pad_token"))]
    return Special(path if path.is_file() else None, folder, *ids)


def vocabulary(tokenizer: "Tokenizer") -> int:
    """Return the vocabulary size that a model needs: above every id, although some smaller ids may be unused."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


class DocumentEncoder:
    """Encode documents, in one piece or in several, with exactly one end token after each.

    Tokens that a tokenizer adds at a document's beginning (``<s>``, ``[CLS]``) are kept. A token that it adds at the end is not
    repeated where it is the end token.

    Args:
        tokenizer: from :func:`load_tokenizer`.
        end: id after each document.
    """

    def __init__(self, tokenizer: "Tokenizer", end: int) -> None:
        self.tokenizer, self.end = tokenizer, end
        probes = chain(("a", "0"), islice(tokenizer.get_vocab(with_added_tokens=False), 1000))  # or one of its own words
        bare, whole = next(filter(None, map(self._ids, probes)), ([], []))
        at = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
        self.before, self.after = whole[:at], whole[at + len(bare) :]
        if self.after[-1:] != [end]:
            self.after = [*self.after, end]

    def _ids(self, probe: str) -> tuple[list[int], list[int]] | None:
        """Return the ids without and with the tokens that the tokenizer adds; None for an unknown word."""
        try:
            bare, whole = (self.tokenizer.encode(probe, add_special_tokens=added).ids for added in (False, True))
        except Exception:  # the library's only class; a word vocabulary without an unknown token raises it
            return None
        return (bare, whole) if bare else None

    def __call__(self, text: str, begins: bool = True, ends: bool = True) -> list[int]:
        """Return the ids of a piece of a document.

        Args:
            text: the piece.
            begins: it is the first piece.
            ends: it is the last piece.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return [*(self.before if begins else ()), *ids, *(self.after if ends else ())]


def _named(name: str, which: str) -> str | None:
    """Return the special token ``which`` from the files next to the tokenizer ``name``."""
    path = Path(name)
    folder = path if path.is_dir() else path.parent if path.is_file() else None
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        found = folder / file if folder is not None else None if name == "kjv" else _of_hub(name, file)
        try:
            token = json.loads(found.read_text(encoding="utf-8")).get(which) if found is not None and found.is_file() else None
        except (OSError, ValueError, AttributeError):  # the tokenizer itself can be read: its own tokens will do
            continue
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


def _of_hub(name: str, file: str) -> Path | None:
    """Fetch a file of a tokenizer on the hub, from the cache or the network; None where it has none."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except Exception:  # no such file or no network, each in several classes; the tokenizer itself was already found
        return None


def _converted(folder: Path) -> "Tokenizer | None":
    """Load a tokenizer from WordPiece's ``vocab.txt`` or sentencepiece's ``tokenizer.model``, through transformers."""
    if not any((folder / name).is_file() for name in ("vocab.txt", "tokenizer.model", "spiece.model")):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    if tokenizer.get_vocab_size() < 3:  # transformers makes an empty one if it does not recognise the files
        raise ValueError("transformers cannot read it; give a tokenizer.json")
    return tokenizer


def _gpt2(folder: Path, key: str) -> "Tokenizer":
    """Build GPT-2's tokenizer from its two BPE files."""
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
