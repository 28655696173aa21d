r"""Draw printable characters from the font files of this machine: a set of images that is hard enough to need a large model.

    apt-get install fonts-liberation fonts-dejavu fonts-lato 'fonts-adf-*' 'fonts-sil-*' 'fonts-league-*' fonts-noto-core
    python -m lowrank_pretrain.data.images.draw_glyphs --out glyphs
    python -m lowrank_pretrain experiment=none data=glyphs data.root=glyphs model=vit_pocket

Writes ``glyphs.npz`` (images and labels of train, val and test), ``fonts.csv`` (file, family, split and licence of each font)
and ``SHA256SUMS``. A family's split follows from the hash of its name, so all its weights and slopes are on one side, and equal
fonts make equal files. Nothing here is to be passed on: the drawings are under their fonts' licences.
"""

import csv
import hashlib
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_pretrain.core.arguments import as_flags, command_parser, print_counts
from lowrank_pretrain.core.checks import whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.data.images.glyphs import CHARACTERS, SPLITS

SIZE = 64  # pixels
SUFFIXES = (".ttf", ".otf")
FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts")
PER_CENT = {"val": 10, "test": 10}  # of the families; the others are trained on
PER_FAMILY = 6  # files of a family: one with 40 weights must not outweigh 40 families
LEAST = 60_000  # training images
LEAST_FONTS, MOST_FONTS = 200, 1000
PROBE = "aegkRQ&8"  # two fonts that draw these alike are one font in two files
TWICE = 3  # different drawings of a character by one font, at most
ALIKE = 0.3  # a letter font's mean correlation with the other fonts' drawings; symbols are below
STYLE = re.compile(
    r"\b(thin|hairline|extra|ultra|semi|demi|light|book|regular|roman|medium|bold|heavy|black|italic|oblique|condensed|cond|"
    r"slanted|narrow|compressed|expanded|extended|wide|mono|sc|caps|outline|shadow|alternate|display|text|caption|[0-9]+(pt)?)\b"
)  # fmt: skip


@dataclass(frozen=True)
class Font:
    """Describe a font file.

    Attributes:
        path: where it lies.
        family: its name, lower case, without words of weight, width and slope.
        licence: as the file says.
        digest: hash of the file.
    """

    path: Path
    family: str
    licence: str
    digest: str

    @property
    def split(self) -> str:
        """Return ``train``, ``val`` or ``test``; the same for all files of a family."""
        draw = int(hashlib.sha256(self.family.encode()).hexdigest()[:8], 16) % 100
        return "val" if draw < PER_CENT["val"] else "test" if draw < sum(PER_CENT.values()) else "train"


def find_fonts(folders: Sequence[str | Path]) -> list[Font]:
    """Return the usable fonts under folders in the order of their hashes: each once, ``PER_FAMILY`` of a family at most."""
    with optional_import():
        from fontTools.ttLib import TTFont, TTLibError
    logging.getLogger("fontTools").setLevel(logging.ERROR)  # it mentions small flaws of many files
    paths = sorted({path for folder in folders for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES})
    families: dict[str, dict[str, Font]] = defaultdict(dict)
    for path in paths:
        try:
            with TTFont(path, lazy=True) as file:
                names, known = file["name"], file.getBestCmap() or {}
                symbols = file["OS/2"].panose.bFamilyType == 5 if "OS/2" in file else False
                family = _family(names.getDebugName(16) or names.getDebugName(1) or path.stem)
                licence = names.getDebugName(13) or names.getDebugName(14) or names.getDebugName(0) or "unknown"
        except (TTLibError, OSError, KeyError, ValueError, AssertionError):  # damaged, or a type that is not outlines
            continue
        if symbols or any(ord(character) not in known for character in CHARACTERS):
            continue
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        families[family].setdefault(digest, Font(path, family, " ".join(licence.split())[:100], digest))
    some = [font for files in families.values() for font in sorted(files.values(), key=lambda one: one.digest)[:PER_FAMILY]]
    return sorted(some, key=lambda one: one.digest)


def _family(name: str) -> str:
    """Return a family's name without words of style: ``Lato Semibold`` and ``Lato`` are one."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower().replace("-", " ").replace("_", " ")
    return " ".join(STYLE.sub(" ", spaced).split()) or spaced


def draw(font: Font, character: str, variant: int) -> np.ndarray | None:
    """Draw a character: white on black, at a size, place and slope of its own that follow from font, character and variant.

    Returns:
        uint8 (64, 64); None if the font leaves it empty or cannot draw it.
    """
    with optional_import():
        from PIL import Image, ImageDraw, ImageFont
    rng = np.random.default_rng([int(font.digest[:8], 16), ord(character), variant])
    size, angle = int(rng.integers(40, 57)), float(rng.uniform(-12, 12))
    across, down = (float(one) for one in rng.uniform(-5, 5, 2))
    image = Image.new("L", (SIZE, SIZE))
    try:
        letters = ImageFont.truetype(str(font.path), size)
        place = (SIZE / 2 + across, SIZE * 0.72 + down)  # one base line, so that a comma and an apostrophe differ
        ImageDraw.Draw(image).text(place, character, 255, font=letters, anchor="ms")
    except (OSError, ValueError, OverflowError):
        return None
    pixels = np.asarray(image.rotate(angle, Image.Resampling.BILINEAR))
    return pixels if pixels.max() > 100 else None


def unlike(fonts: Sequence[Font]) -> list[Font]:
    """Return the fonts without those that draw Latin letters as an earlier one does, for example Noto Sans for each script."""
    with optional_import():
        from PIL import ImageFont
    found: dict[bytes, Font] = {}
    for font in fonts:
        try:
            letters = ImageFont.truetype(str(font.path), 32)
            key = hashlib.sha256(b"".join(bytes(letters.getmask(one)) for one in PROBE)).digest()
        except (OSError, ValueError, OverflowError):
            continue
        found.setdefault(key, font)
    return list(found.values())


def draw_font(font: Font, variants: int) -> np.ndarray | None:
    """Return a font's drawings, uint8 (characters, variants, 64, 64); None if it lacks one or draws many alike."""
    found = np.zeros((len(CHARACTERS), variants, SIZE, SIZE), np.uint8)
    for row, character in enumerate(CHARACTERS):
        for variant in range(variants):
            pixels = draw(font, character, variant)
            if pixels is None:
                return None
            found[row, variant] = pixels
    return found


def letter_fonts(drawn: dict[Font, np.ndarray]) -> dict[Font, np.ndarray]:
    """Return the fonts whose drawings look like everybody's: fonts of symbols draw other things in the letters' places."""
    if not drawn:
        return {}
    shapes = {}
    for font, images in drawn.items():
        small = images[:, 0].reshape(len(CHARACTERS), 16, 4, 16, 4).mean((2, 4)).reshape(len(CHARACTERS), -1)
        small = small - small.mean(1, keepdims=True)
        shapes[font] = small / np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-9)
    middle = np.median(np.stack(list(shapes.values())), 0)  # (characters, 256)
    middle /= np.maximum(np.linalg.norm(middle, axis=1, keepdims=True), 1e-9)
    return {font: drawn[font] for font, shape in shapes.items() if float((shape * middle).sum(1).mean()) >= ALIKE}


def make_glyphs(
    out: str | Path, folders: Sequence[str | Path] = FOLDERS, least: int = LEAST, least_fonts: int = LEAST_FONTS,
    most_fonts: int = MOST_FONTS,
) -> dict[str, int]:  # fmt: skip
    """Write the set under ``out``.

    Args:
        out: folder, made if missing.
        folders: to look for fonts in.
        least: so many training images are needed; a character is drawn up to three times by a font to reach them.
        least_fonts: so many fonts are needed, over all splits.
        most_fonts: so many are drawn, the first in the order of their hashes, which mixes the families.

    Returns:
        The number of images by split.

    Raises:
        ConfigError: a wrong value, or too few fonts; nothing is written then.
    """
    whole("least", least, 1, "images")
    whole("least_fonts", least_fonts, 3, "fonts")
    whole("most_fonts", most_fonts, least_fonts, "fonts")
    fonts = unlike(find_fonts(folders))[:most_fonts]
    trained = max(1, sum(font.split == "train" for font in fonts))
    variants = min(TWICE, -(-least // (int(0.9 * trained) * len(CHARACTERS) or 1)))  # some fonts turn out to be symbols
    drawn = {font: drawing for font in fonts if (drawing := draw_font(font, variants)) is not None}
    kept = letter_fonts(drawn)
    count = {split: sum(font.split == split for font in kept) for split in SPLITS}
    images = {split: number * variants * len(CHARACTERS) for split, number in count.items()}
    if len(kept) < least_fonts or images["train"] < least or not all(count.values()):
        raise ConfigError(
            "fonts", ", ".join(map(str, folders)), f"hold {len(kept)} usable fonts ({images['train']:,} training images); "
            f"{least_fonts} fonts and {least:,} images are needed: apt-get install fonts-noto-core fonts-lato 'fonts-adf-*' "
            "'fonts-sil-*' 'fonts-league-*', or name more folders with --fonts"
        )  # fmt: skip
    _write(Path(out), kept)
    return images


def _write(out: Path, kept: dict[Font, np.ndarray]) -> None:
    """Write images in the order of the fonts' hashes, the list of fonts, and checksums that do not depend on compression."""
    out.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    for split in SPLITS:
        mine = [images for font, images in kept.items() if font.split == split]
        variants = mine[0].shape[1]
        arrays[f"{split}_images"] = np.concatenate(mine).reshape(-1, SIZE, SIZE)
        arrays[f"{split}_labels"] = np.tile(np.repeat(np.arange(len(CHARACTERS), dtype=np.uint8), variants), len(mine))
    new = out / "new.glyphs.npz"
    np.savez_compressed(new, **arrays)
    new.replace(out / "glyphs.npz")
    with (out / "fonts.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "family", "split", "licence"])
        writer.writerows([font.path.name, font.family, font.split, font.licence] for font in kept)
    sums = [f"{hashlib.sha256(values.tobytes()).hexdigest()}  {name}\n" for name, values in arrays.items()]
    (out / "SHA256SUMS").write_text("".join(sums))


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 2 for a wrong value."""
    parser = command_parser("data.images.draw_glyphs", __doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--fonts", nargs="+", default=FOLDERS, help="folders to look for fonts in")
    parser.add_argument("--least", type=int, default=LEAST, help="training images that are needed")
    parser.add_argument("--least-fonts", type=int, default=LEAST_FONTS, help="fonts that are needed")
    parser.add_argument("--most-fonts", type=int, default=MOST_FONTS, help="fonts to draw at most")
    args = parser.parse_args(as_flags(argv, parser))
    return print_counts(
        lambda: make_glyphs(args.out, args.fonts, args.least, args.least_fonts, args.most_fonts),
        lambda split, count: f"{split}: {count:,} images",
    )


if __name__ == "__main__":
    sys.exit(main())
