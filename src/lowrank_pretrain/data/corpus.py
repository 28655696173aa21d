r"""Make a real corpus of what every installation has: Python sources and documentation of its packages and its interpreter.

    python -m lowrank_pretrain.data.corpus --out corpus
    python -m lowrank_pretrain experiment=none data=docs_corpus data.root=corpus model=llama_pocket

Writes ``train.bin``, ``val.bin`` and ``test.bin``, the tokenizer, ``sources.csv`` (files, bytes and licence of each package)
and ``SHA256SUMS``. Exact duplicates go in once. A file's split follows from its hash, so equal installations make equal files.
Nothing here is to be passed on: the texts are under their packages' licences.
"""

import csv
import hashlib
import os
import string
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lowrank_pretrain.core.arguments import as_flags, command_parser, print_counts
from lowrank_pretrain.core.checks import whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data.checksums import SUMS
from lowrank_pretrain.data.text.bins import write_bin
from lowrank_pretrain.data.text.tokenizer import DocumentEncoder, load_tokenizer, train_bpe

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
SMALLEST, LARGEST = 200, 1_000_000  # bytes; larger files are generated, or data
PER_MILLE = {"val": 10, "test": 10}  # of all files; the others are trained on
TOKENIZER_BYTES = 20_000_000  # of training text that the tokenizer learns from
LEAST, MOST = 30_000_000, 60_000_000  # training tokens
OURS = "lowrank-pretrain"  # changes during development
WORDS = 0.6  # share of letters and white space in what counts as a text; tables of numbers have less
LETTERS = string.ascii_letters.encode() + string.whitespace.encode() + bytes(range(128, 256))  # these: other alphabets


@dataclass(frozen=True)
class Source:
    """Describe a file of a package.

    Attributes:
        package: name and version.
        licence: as the package's metadata says.
        path: where it lies.
    """

    package: str
    licence: str
    path: Path


@dataclass(frozen=True)
class Text:
    """Hold a file's text and its hash. Texts sort by hash, which mixes the packages."""

    digest: str
    text: str
    source: Source

    @property
    def split(self) -> str:
        """Return ``train``, ``val`` or ``test``."""
        draw = int(self.digest[:12], 16) % 1000
        return "val" if draw < PER_MILLE["val"] else "test" if draw < sum(PER_MILLE.values()) else "train"


def installed() -> Iterator[Source]:
    """Yield the files of every installed package, then of the interpreter's own library."""
    seen = set()
    for package in sorted(metadata.distributions(), key=lambda one: (_name(one), str(one.version))):
        name = _name(package)
        if name in (OURS, "") or name in seen:  # the first on the path is what an import finds
            continue
        seen.add(name)
        for file in package.files or ():  # None: installed without a list of its files
            path = Path(str(package.locate_file(file)))
            if path.suffix in SUFFIXES and ".dist-info" not in str(file) or path.name == "METADATA":
                yield Source(f"{name} {package.version}", _licence(package), path)
    library = Path(sysconfig.get_paths()["stdlib"])
    version = f"python {sys.version.split()[0]}"
    for folder, folders, files in os.walk(library):
        folders[:] = sorted(f for f in folders if f not in ("site-packages", "dist-packages", "__pycache__"))
        for name in sorted(files):
            if Path(name).suffix in SUFFIXES:
                yield Source(version, "PSF-2.0", Path(folder) / name)


def _name(package: metadata.Distribution) -> str:
    return str(package.metadata["Name"] or "").lower().replace("_", "-")


def _licence(package: metadata.Distribution) -> str:
    """Return a package's licence on one line; ``unknown`` if it states none."""
    said = package.metadata
    classes = [c.rpartition(" :: ")[2] for c in said.get_all("Classifier") or () if c.startswith("License")]
    words = str(said["License-Expression"] or "; ".join(classes) or said["License"] or "").strip()
    return words.splitlines()[0][:80] if words else "unknown"


def read_texts(sources: Iterable[Source]) -> list[Text]:
    """Return the texts among the files, each once, in the order of their hashes."""
    found: dict[str, Text] = {}
    for source in sources:
        try:
            if not SMALLEST <= source.path.stat().st_size <= LARGEST:
                continue
            raw = source.path.read_bytes()
            text = raw.decode("utf-8").replace("\r\n", "\n")
        except (OSError, UnicodeDecodeError):  # gone since the list was written, or no text
            continue
        if b"\0" in raw or len(raw.translate(None, LETTERS)) > (1 - WORDS) * len(raw):
            continue
        digest = hashlib.sha256(text.encode()).hexdigest()
        found.setdefault(digest, Text(digest, text, source))
    return [found[digest] for digest in sorted(found)]


def make_corpus(
    out: str | Path, vocab_size: int = 4096, least: int = LEAST, most: int = MOST, sources: Iterable[Source] | None = None
) -> dict[str, int]:
    """Write the corpus under ``out``.

    Args:
        out: folder, made if missing.
        vocab_size: of the byte-level BPE that is trained on a part of the training text.
        least: so many training tokens are needed.
        most: the training part ends with the text that reaches so many; hashes mix the packages, so it is a fair sample.
        sources: files to make it of; None: those of this installation.

    Returns:
        The number of tokens by split.

    Raises:
        ConfigError: a wrong value; fewer tokens than ``least`` (``train.bin`` is not written then).
    """
    whole("vocab_size", vocab_size, 257, "tokens")
    whole("least", least, 1, "tokens")
    whole("most", most, least, "tokens")
    texts = read_texts(installed() if sources is None else sources)
    by_split: dict[str, list[Text]] = {"train": [], "val": [], "test": []}
    for text in texts:
        by_split[text.split].append(text)
    empty = [split for split, some in by_split.items() if not some]
    if empty:
        raise ConfigError("least", least, f"{len(texts)} different texts were found, too few for a {empty[0]} part")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    trained = out / "trained.json"  # a corpus that is there keeps its own tokenizer until the new one is whole
    train_bpe(_some(by_split["train"]), vocab_size).save(str(trained), pretty=False)
    encode = DocumentEncoder(*load_tokenizer(str(trained)))
    counts = {}
    for split, some in by_split.items():
        limit = most if split == "train" else most // 50
        counts[split] = write_bin(out / f"{split}.bin.new", _encoded(some, encode, limit), vocab_size)
    if counts["train"] < least:
        for split in counts:
            (out / f"{split}.bin.new").unlink()
        trained.unlink()
        packages = len({one.source.package for one in texts})
        raise ConfigError(
            "least", least, f"{packages} packages gave {counts['train']:,} training tokens: install more packages (the extras "
            "hub, bench and dev of this one, say), or ask for fewer tokens"
        )  # fmt: skip
    (out / SUMS).unlink(missing_ok=True)  # of an earlier corpus
    for split in counts:
        (out / f"{split}.bin.new").replace(out / f"{split}.bin")
    trained.replace(out / "tokenizer.json")
    _write_record(out, texts, counts)
    return counts


def _encoded(texts: list[Text], encode: DocumentEncoder, most: int) -> Iterator[list[int]]:
    """Yield ids text by text, until there are enough."""
    count = 0
    for one in texts:
        if count >= most:
            return
        ids = encode(one.text)
        count += len(ids)
        yield ids


def _some(texts: list[Text]) -> Iterator[str]:
    """Yield training texts for the tokenizer, as many as it needs."""
    left = TOKENIZER_BYTES
    for one in texts:
        if left <= 0:
            return
        left -= len(one.text)
        yield one.text


def _write_record(out: Path, texts: list[Text], counts: dict[str, int]) -> None:
    """Write the list of sources, and checksums that show whether two installations agree."""
    rows: dict[tuple[str, str], list[int]] = {}
    for one in texts:
        row = rows.setdefault((one.source.package, one.source.licence), [0, 0])
        row[0], row[1] = row[0] + 1, row[1] + len(one.text.encode())
    with (out / "sources.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["package", "licence", "files", "bytes"])
        writer.writerows([*key, *row] for key, row in sorted(rows.items()))
    names = [*(f"{split}.bin" for split in counts), "tokenizer.json"]
    sums = [f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (out / SUMS).write_text("".join(sums))


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 for a wrong value."""
    parser = command_parser("data.corpus", __doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--least", type=int, default=LEAST, help="training tokens that are needed")
    parser.add_argument("--most", type=int, default=MOST, help="training tokens to end with")
    args = parser.parse_args(as_flags(argv, parser))
    return print_counts(
        lambda: make_corpus(args.out, args.vocab_size, args.least, args.most),
        lambda split, count: f"{Path(args.out) / split}.bin: {count:,} tokens",
    )


if __name__ == "__main__":
    sys.exit(main())
