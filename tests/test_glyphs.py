"""Characters drawn from font files: which fonts count, how they are split, that it is the same twice, what is refused."""

import hashlib
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data import SAMPLES
from lowrank_pretrain.data.images import draw_glyphs
from lowrank_pretrain.data.images.draw_glyphs import Font, find_fonts, make_glyphs, unlike
from lowrank_pretrain.data.images.glyphs import CHARACTERS, Glyphs, read_fonts, read_glyphs

SHIPPED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # comes with matplotlib on every machine
WANTED = ["train", "train", "val", "test"]


def renamed(source, path, family):
    with TTFont(source) as font:
        for record in font["name"].names:
            if record.nameID in (1, 16):
                record.string = family
        font.save(path)


@pytest.fixture(scope="module")
def fonts(tmp_path_factory):
    """Eight DejaVu fonts as four families, two of them for training; a font without letters; a damaged file."""
    folder = tmp_path_factory.mktemp("fonts")
    names = iter(f"family {chr(97 + a)}{chr(97 + b)}" for a in range(26) for b in range(26))
    files = sorted(SHIPPED.glob("DejaVu*.ttf"))
    files = [path for path in files if "Display" not in path.name][:8]
    for number, split in enumerate(WANTED):
        family = next(name for name in names if Font(folder, name, "", "").split == split)
        for path in files[2 * number : 2 * number + 2]:
            renamed(path, folder / path.name, family.title())
    (folder / "cmex10.ttf").write_bytes((SHIPPED / "cmex10.ttf").read_bytes())
    (folder / "broken.ttf").write_bytes(b"\0\1\0\0 no font")
    return folder


@pytest.fixture(scope="module")
def made(fonts, tmp_path_factory):
    out = tmp_path_factory.mktemp("glyphs")
    return out, make_glyphs(out, [fonts], least=700, least_fonts=4)


def test_a_family_is_on_one_side_and_symbols_are_left_out(fonts, made):
    out, counts = made
    rows = read_fonts(out)
    assert len(rows) == 8 and {row["file"] for row in rows}.isdisjoint({"cmex10.ttf", "broken.ttf"})
    assert {split: sum(row["split"] == split for row in rows) for split in ("train", "val", "test")} == {
        "train": 4, "val": 2, "test": 2,
    }  # fmt: skip
    assert len({(row["family"], row["split"]) for row in rows}) == len({row["family"] for row in rows}) == 4
    assert all("Bitstream" in row["licence"] or "Fonts are" in row["licence"] for row in rows)
    variants = counts["train"] // (4 * len(CHARACTERS))
    assert variants > 1 and counts == {"train": 4 * 94 * variants, "val": 2 * 94 * variants, "test": 2 * 94 * variants}


def test_images_match_their_labels(made):
    images, labels = read_glyphs(str(made[0]))["train"]
    assert images.shape == (len(labels), 64, 64) and images.dtype == np.uint8 and set(labels) == set(range(94))
    ink = {character: images[labels == CHARACTERS.index(character)].mean() for character in ".,M@-"}
    assert ink["."] < ink["M"] and ink[","] < ink["M"] and ink["-"] < ink["@"]
    middle = {c: images[labels == CHARACTERS.index(c)].astype(float).sum((0, 2)) @ np.arange(64) for c in "'_"}
    height = {c: middle[c] / images[labels == CHARACTERS.index(c)].sum() for c in "'_"}
    assert height["'"] + 15 < height["_"]  # one base line
    first = images[labels == CHARACTERS.index("R")][:2]
    assert not np.array_equal(*first)


def test_the_same_fonts_make_the_same_set(fonts, made, tmp_path):
    make_glyphs(tmp_path, [fonts], least=700, least_fonts=4)
    assert (tmp_path / "SHA256SUMS").read_text() == (made[0] / "SHA256SUMS").read_text()
    arrays = read_glyphs(str(tmp_path))
    assert hashlib.sha256(arrays["val"][0].tobytes()).hexdigest() in (tmp_path / "SHA256SUMS").read_text()


def test_a_font_under_two_names_counts_once(fonts, tmp_path):
    for number in range(2):
        renamed(SHIPPED / "DejaVuSans.ttf", tmp_path / f"{number}.ttf", f"other name {number}")
    assert len(find_fonts([tmp_path])) == 2 and len(unlike(find_fonts([tmp_path]))) == 1


def test_too_few_fonts_name_the_packages_to_install(fonts, tmp_path, capsys):
    assert draw_glyphs.main(["--out", str(tmp_path / "out"), "--fonts", str(fonts)]) == 2
    said = capsys.readouterr().err
    assert "hold 8 usable fonts" in said and "apt-get install fonts-noto-core" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="hold 0 usable fonts"):
        make_glyphs(tmp_path, [tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="most_fonts=1: "):
        make_glyphs(tmp_path, [fonts], most_fonts=1)


def test_the_sample_trains_and_its_parts_are_different_fonts():
    data = instantiate(OmegaConf.load(SAMPLES.parents[3] / "conf" / "data" / "glyphs.yaml"), _convert_="all", batch_size=8)
    data.setup()
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == (8, 1, 64, 64) and y.max() < 94 and len(data.train_set) == 8 * 94
    assert len(data.val_set) == len(data.test_set) == 2 * 94
    assert abs(float(data.train_set.fetch(0, list(range(752))).batch[0].mean())) < 0.3


def test_missing_or_damaged_files_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"must hold glyphs.npz: python -m .*draw_glyphs --out glyphs"):
        Glyphs(str(tmp_path)).setup()
    (tmp_path / "glyphs.npz").write_bytes(b"PK no zip")
    with pytest.raises(ConfigError, match="cannot be read"):
        Glyphs(str(tmp_path)).setup()


def test_files_that_are_damaged_or_not_those_of_the_checksums_are_one_line(tmp_path):
    raw = (SAMPLES / "glyphs.npz").read_bytes()
    flipped = raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 255]) + raw[len(raw) // 2 + 1 :]
    for name, data in (("cut", raw[: len(raw) // 2]), ("empty", b""), ("flipped", flipped)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "glyphs.npz").write_bytes(data)
        with pytest.raises(ConfigError, match="glyphs.npz cannot be read .*make it again"):
            read_glyphs(tmp_path / name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "glyphs.npz").write_bytes(raw)
    sums = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in np.load(SAMPLES / "glyphs.npz").items()}
    file = tmp_path / "other" / "SHA256SUMS"
    file.write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))
    assert read_glyphs(tmp_path / "other")
    file.write_text(file.read_text().replace(sums["val_labels"], "0" * 64))
    with pytest.raises(ConfigError, match="val_labels is not what SHA256SUMS names, so it was changed or damaged"):
        read_glyphs(tmp_path / "other")
