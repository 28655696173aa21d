"""Pictures as people have them: kinds of files, folders with and without parts, archives, what is left out and what is said."""

import io
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data.images.datasets import ImageData
from lowrank_pretrain.data.images.fashion_mnist import FashionMNIST
from lowrank_pretrain.data.images.files import upright_rgb
from lowrank_pretrain.data.images.folders import held_out, image_endings, split_folder
from lowrank_pretrain.data.images.medmnist import CLASSES, MedMNIST
from lowrank_pretrain.data.images.sources import open_images, take_dropped
from tests.data_helpers import cifar10, fit, image_folder, medmnist_npz, picture


def images(root, **kwargs):
    return ImageData(str(root), **{"batch_size": 4, "num_workers": 0, "img_size": 16} | kwargs)


def set_up(data):
    """The data module after ``setup``, and what was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data.setup()
    return data, [str(w.message) for w in caught]


def refuses(match, function, *args, **kwargs):
    with pytest.raises(ConfigError, match=match) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)


# ---- one picture

RGB = np.random.default_rng(3).integers(0, 256, (10, 12, 3), np.uint8)
GRAY = RGB[..., 0]


def written(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def expected(mode):
    return np.asarray(Image.fromarray(RGB).convert(mode).convert("RGB"))


MODES = {
    "png": (Image.fromarray(RGB), "PNG", RGB),
    "bmp": (Image.fromarray(RGB), "BMP", RGB),
    "tiff": (Image.fromarray(RGB), "TIFF", RGB),
    "webp": (Image.fromarray(RGB), "WEBP", RGB),
    "ppm": (Image.fromarray(RGB), "PPM", RGB),
    "gray": (Image.fromarray(GRAY), "PNG", np.stack([GRAY] * 3, -1)),
    "one bit": (Image.fromarray(GRAY).convert("1"), "PNG", np.asarray(Image.fromarray(GRAY).convert("1").convert("RGB"))),
    "palette": (Image.fromarray(RGB).convert("P"), "PNG", expected("P")),
    "gif": (Image.fromarray(RGB).convert("P"), "GIF", expected("P")),
    "cmyk": (Image.fromarray(RGB).convert("CMYK"), "TIFF", expected("CMYK")),
    "gray and alpha": (Image.fromarray(RGB).convert("LA"), "PNG", expected("L")),
    "alpha": (Image.fromarray(RGB).convert("RGBA"), "PNG", RGB),
    "16 bit": (Image.fromarray(GRAY.astype(np.uint16) * 257), "PNG", np.stack([GRAY] * 3, -1)),
    "16 bit tiff": (Image.fromarray(GRAY.astype(np.uint16) * 257), "TIFF", np.stack([GRAY] * 3, -1)),
    "32 bit": (Image.fromarray(GRAY.astype(np.int32) * 257), "TIFF", np.stack([GRAY] * 3, -1)),
    "float 0..1": (Image.fromarray(GRAY.astype(np.float32) / 255), "TIFF", np.stack([GRAY] * 3, -1)),
    "float 0..255": (Image.fromarray(GRAY.astype(np.float32)), "TIFF", np.stack([GRAY] * 3, -1)),
}


@pytest.mark.parametrize("what", MODES)
def test_a_picture_of_any_mode_keeps_its_shades(what):
    image, kind, want = MODES[what]
    options = {"lossless": True} if kind == "WEBP" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = upright_rgb(written(image, kind, **options))
    assert got.mode == "RGB"
    assert np.abs(np.asarray(got).astype(int) - want.astype(int)).max() <= 1


def test_a_palette_with_transparency_is_read_quietly():
    image = Image.fromarray(RGB).convert("P")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert upright_rgb(written(image, "PNG", transparency=bytes(range(256)))).mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_camera_was(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = upright_rgb(written(Image.fromarray(RGB), "PNG", exif=exif))
    assert turned.size == ((12, 10) if orientation <= 4 else (10, 12))
    want = ImageOps.exif_transpose(written(Image.fromarray(RGB), "PNG", exif=exif))
    assert np.array_equal(np.asarray(turned), np.asarray(want))


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(np.full((8, 8, 3), shade, np.uint8)) for shade in (200, 10)]
    for kind in ("GIF", "WEBP", "TIFF"):
        got = np.asarray(upright_rgb(written(frames[0], kind, save_all=True, append_images=frames[1:])))
        assert abs(int(got.mean()) - 200) <= 2, kind


# ---- a folder of twelve kinds

KINDS = ("png", "PNG", "jpg", "JPG", "jpeg", "webp", "tif", "TIFF", "bmp", "gif", "ppm", "jp2")


def many_kinds(root, per_kind=3, classes=("a", "b", "c")):
    rng = np.random.default_rng(1)
    for name in classes:
        (root / name).mkdir(parents=True)
        for ending in KINDS:
            for i in range(per_kind):
                image = picture(rng)
                if ending == "TIFF":
                    image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257)
                image.save(root / name / f"{ending}{i}.{ending}")
    return root


def test_a_hundred_pictures_of_twelve_kinds_are_all_read(tmp_path):
    data, said = set_up(images(many_kinds(tmp_path / "pets"), val_fraction=0.25))
    train, val = data.train_set, data.val_set
    assert len(train) + len(val) == 3 * 12 * 3 and len(val) == 27
    assert data.class_names == ["a", "b", "c"] and data.num_classes == 3 and data.dataset_name == "pets"
    fetched = [part.fetch(0, list(range(len(part)))) for part in (train, val)]
    assert not [line for f in fetched for line in f.bad]
    assert all(
        torch.bincount(f.batch[1]).tolist() == [len(part) // 3] * 3 for f, part in zip(fetched, (train, val), strict=True)
    )
    assert said == [f"{tmp_path}/pets has no folders for training and validation; data.val_fraction=0.25 of each class, "
                    "27 of 108 images, is held out for validation"]  # fmt: skip
    assert {member.path for member in train.base.members}.isdisjoint({member.path for member in val.base.members})
    # shades of 16 bits are kept: cut off at 255, nearly all of such a picture would be white
    at = next(i for i, m in enumerate(train.base.members) if m.path.endswith(".TIFF"))
    assert np.asarray(train._open(at)[0]).mean() < 220


def test_a_class_of_one_kind_does_not_vanish(tmp_path):
    for name, ending in (("a", "webp"), ("b", "png"), ("c", "bmp")):
        for split in ("train", "val"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                picture(np.random.default_rng(i)).save(folder / f"{i}.{ending}")
    data, said = set_up(images(tmp_path))
    assert data.class_names == ["a", "b", "c"] and not said
    refuses("num_classes=2: must be at least 3, the classes of train", images(tmp_path, num_classes=2).setup)


def test_what_is_no_picture_is_counted_by_kind(tmp_path):
    root = image_folder(tmp_path, per_class=4)
    for name in ("notes.txt", "labels.csv", "more.txt", "cat/a.heic", "dog/b.HEIC", "dog/README"):
        (root / "train" / name).write_text("x")
    for hidden in (".DS_Store", "Thumbs.db", ".ipynb_checkpoints/1.png", "cat/.hidden.png"):
        path = root / "train" / hidden
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    data, said = set_up(images(root))
    assert len(data.train_set) == 8 and data.class_names == ["cat", "dog"]
    assert said == [f"{root}: 6 files left out that Pillow does not read as images: 2 .txt, 1 .csv, 1 .heic, 1 .HEIC, "
                    "1 without an ending"]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hflip", -0.1), ("vflip", 2), ("re_prob", True), ("color_jitter", -1), ("crop_pct", 0), ("crop_pct", 1.5),
        ("interpolation", "cubic"), ("scale", [0.5]), ("scale", [0.8, 0.2]), ("scale", [0.1, 2]), ("ratio", [0, 1]),
        ("ratio", ["a", "b"]), ("img_size", 10**12), ("num_classes", 10**12), ("mean", []), ("std", [1, 1, -1]),
    ],
)  # fmt: skip
def test_augmentation_that_cannot_be_meant_is_refused(key, value):
    refuses(f"^{key}=", images, "/nowhere", **{key: value})


def test_endings_are_those_that_pillow_opens():
    endings = image_endings()
    assert {".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".tga", ".ico", ".pgm"} <= endings
    assert not {".pdf", ".eps", ".h5", ".mpg", ".txt", ""} & endings


# ---- parts

LAYOUTS = {
    "flat": (["1.png", "2.png"], "root=.*must hold a folder for each class: 2 of its 2 images lie outside of any, e.g. 1.png"),
    "flat part": (
        ["train/1.png", "train/2.png", "val/a/1.png"],
        "root='.*train': must hold a folder for each class: 2 of its 2 images",
    ),
    "some outside": (["a/1.png", "b/1.png", "stray.png"], "root=.*1 of its 3 images lie outside of any, e.g. stray.png"),
    "parts of other names": (
        ["tren/a/1.png", "tren/b/1.png", "prove/a/1.png"],
        "train_split='train': must be a folder under .*, there are: prove, tren",
    ),
    "only a test part": (["test/a/1.png", "test/b/1.png"], "train_split='train': must be a folder under .*, there are: test"),
    "no pictures": (["a/1.txt", "b/2.doc"], "root=.*must hold images: Found 0 images there, but 1 .txt, 1 .doc"),
    "a class of other files": (
        ["train/a/1.png", "train/b/1.heic", "val/a/1.png"],
        "root='.*train': must hold images in the folder of each class; no file that Pillow reads is in b",
    ),
    "an empty part": (["train/a/1.png", "train/b/1.png", "val/"], "root='.*val': must hold images: Found 0 images"),
    "flat parts": (["train/1.png", "train/2.png", "test/1.png"], "root='.*train': must hold a folder for each class"),
    "one picture a class": (["a/1.png", "b/1.png"], "val_fraction=0.1: must leave images on both sides: 2 images in 2 classes"),
}


def lay(root, files):
    for name in files:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(np.random.default_rng(0)).save(path) if path.suffix == ".png" else path.write_text("x")
    return root


@pytest.mark.parametrize("what", LAYOUTS)
def test_a_folder_that_cannot_be_meant_is_refused(tmp_path, what):
    files, said = LAYOUTS[what]
    refuses(said, images(lay(tmp_path, files)).setup)


def names(part):
    return sorted(member.path for member in part.base.members)


def test_validation_is_held_out_where_there_is_no_part_for_it(tmp_path):
    files = [f"train/{c}/{i}.png" for c in "abc" for i in range(10)] + [f"test/{c}/0.png" for c in "abc"]
    root = lay(tmp_path, files)
    data, said = set_up(images(root, val_fraction=0.2))
    assert len(data.train_set) == 24 and len(data.val_set) == 6 and data.test_set is data.val_set
    labels = [data.val_set.base.members[i].label for i in range(6)]
    assert sorted(labels) == [0, 0, 1, 1, 2, 2]
    assert said == [f"{root}/test is not used: tests are made on the validation part; data.test_split=test takes it",
                    f"{root} has no folder for validation, it has test, train; data.val_fraction=0.2 of each class, 6 of 30 "
                    "images, is held out for validation"]  # fmt: skip
    assert not set(names(data.train_set)) & set(names(data.val_set))
    with_test, said = set_up(images(root, val_fraction=0.2, test_split="test"))
    assert not [line for line in said if "not used" in line]
    assert names(with_test.test_set) == [f"test/{c}/0.png" for c in "abc"] and names(with_test.val_set) == names(data.val_set)
    assert names(set_up(images(root, val_split="test"))[0].val_set) == names(with_test.test_set)


@pytest.mark.parametrize("part", ["test", "Testing"])
def test_a_test_part_that_is_not_used_is_named(tmp_path, part):
    root = lay(tmp_path, [f"{split}/{c}/{i}.png" for split in ("train", "val", part) for c in "ab" for i in "12"])
    said = set_up(images(root))[1]
    assert said == [f"{root}/{part} is not used: tests are made on the validation part; data.test_split={part} takes it"]
    assert not set_up(images(root, test_split=part))[1]


def test_a_link_that_leads_back_adds_no_pictures(tmp_path):
    root = Path(lay(tmp_path / "set", [f"{c}/{i}.png" for c in "ab" for i in range(4)]))
    (root / "a" / "again").symlink_to(root / "a")
    (root / "b" / "all").symlink_to(root)
    lay(tmp_path, [f"more/{i}.png" for i in range(4)])
    (root / "c").symlink_to(tmp_path / "more")
    data, _ = set_up(images(str(root)))
    assert data.class_names == ["a", "b", "c"] and len(data.train_set) + len(data.val_set) == 12


def test_parts_may_be_written_in_capitals_and_a_class_may_be_called_train(tmp_path):
    data, said = set_up(
        images(lay(tmp_path / "a", [f"{part}/{c}/{i}.png" for part in ("Train", "Valid") for c in "ab" for i in "12"]))
    )
    assert names(data.val_set) == [f"Valid/{c}/{i}.png" for c in "ab" for i in "12"] and not said
    data, _ = set_up(images(lay(tmp_path / "b", [f"{c}/{i}.png" for c in ("bus", "train", "car") for i in range(4)])))
    assert data.class_names == ["bus", "car", "train"] and len(data.train_set) == 9


def test_what_is_held_out_depends_on_the_seed_of_the_data_alone():
    labels = np.repeat(np.arange(5), 40)
    first = held_out(labels, 0.1, 0)
    assert np.array_equal(first, held_out(labels, 0.1, 0)) and not np.array_equal(first, held_out(labels, 0.1, 1))
    assert np.bincount(labels[first]).tolist() == [4] * 5
    few = np.array([0, 0, 1, 2, 2, 2])
    assert np.bincount(few[held_out(few, 0.1, 0)], minlength=3).tolist() == [1, 0, 1]  # a single picture is trained on
    assert np.bincount(few[held_out(few, 0.9, 0)], minlength=3).tolist() == [1, 0, 2]
    for wrong in (0, 1, 1.5, -0.1, True):
        refuses("val_fraction=.*must be a share above 0 and below 1", images, "/nowhere", val_fraction=wrong)


def test_classes_are_the_top_folders_in_natural_order(tmp_path):
    files = [f"train/{c}/{session}/{i}.png" for c in ("2", "10", "1") for session in "xy" for i in range(2)]
    root = lay(tmp_path, files + [name.replace("train", "val") for name in files])
    data, _ = set_up(images(root))
    assert data.class_names == ["1", "2", "10"] and len(data.train_set) == 12
    assert {m.path.split("/")[1]: m.label for m in data.train_set.base.members} == {"1": 0, "2": 1, "10": 2}


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("top", ["", "pets/"])
def test_an_archive_is_read_as_its_folders_would_be(tmp_path, kind, parts, top):
    folder = tmp_path / "folder"
    files = [f"{part}{c}/{i}.png" for part in (("train/", "val/") if parts else ("",)) for c in "ab" for i in range(4)]
    lay(folder, [*files, "notes.txt"])
    path = tmp_path / f"set.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as file:
            for name in ("notes.txt", *files):
                file.add(folder / name, top + name)
    else:
        with zipfile.ZipFile(path, "w") as file:
            for name in ("notes.txt", *files):
                file.write(folder / name, top + name)
    packed, said = set_up(images(path, num_workers=2))
    plain, _ = set_up(images(folder))
    assert packed.class_names == plain.class_names == ["a", "b"]
    assert [n.removeprefix(top) for n in names(packed.train_set)] == names(plain.train_set)
    assert any("1 file left out" in line and ".txt" in line for line in said) and len(said) == (1 if parts else 2)
    assert torch.equal(packed.train_set.fetch(1, [0, 3]).batch[0], plain.train_set.fetch(1, [0, 3]).batch[0])
    assert len(list(packed.train_dataloader())) == len(packed.train_set) // 4  # in forked workers
    packed.teardown()


def test_archives_that_cannot_be_read(tmp_path):
    path = tmp_path / "set.tar"
    for content in (b"", b"no archive" * 100):
        path.write_bytes(content)
        refuses("root='.*set.tar': (cannot be read as an archive|must hold images)", images(path).setup)
    path = tmp_path / "set.zip"
    path.write_bytes(b"PK\3\4 no")
    refuses("root='.*set.zip': cannot be read as an archive", images(path).setup)
    path = tmp_path / "set.tar.gz"
    path.write_bytes(b"\x1f\x8b")
    refuses("root='.*set.tar.gz': must be a folder of images, or a .tar or .zip", images(path).setup)


def test_a_damaged_member_of_an_archive_is_named(tmp_path):
    lay(tmp_path / "f", [f"{c}/{i}.png" for c in "ab" for i in range(6)])
    (tmp_path / "f" / "a" / "2.png").write_bytes(b"no picture")
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as file:
        for member in sorted((tmp_path / "f").rglob("*.png")):
            file.write(member, member.relative_to(tmp_path / "f"))
    data, _ = set_up(images(tmp_path / "s.zip", seed=1))
    lines = [line for part in (data.train_set, data.val_set) for line in part.fetch(0, list(range(len(part)))).bad]
    assert len(lines) == 1 and lines[0].startswith(f"{tmp_path}/s.zip/a/2.png (")


# ---- what is said of unreadable ones


def test_warnings_of_unreadable_pictures_are_ours_and_bounded(tmp_path, capsys):
    from lowrank_pretrain.data.loaders import batch as fetching

    root = image_folder(tmp_path, per_class=40)
    for i in range(30):
        (root / "train" / "cat" / f"{i}.{'png' if i % 2 else 'jpg'}").write_bytes(b"no picture")
    data, _ = set_up(images(root))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # another epoch says nothing new
            for _ in data.train_dataloader():
                pass
    lines = [w for w in caught if "unreadable" in str(w.message)]
    assert len(lines) == fetching.NAMED and all(Path(w.filename) == Path(fetching.__file__) for w in lines)
    assert "of further ones only the number" in str(lines[-1].message)
    assert "number 1, the next one that can be read takes its place: " in str(lines[0].message)


# ---- sets by name


def test_the_number_of_classes_is_the_sets_own(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    root = cifar10(tmp_path)
    data = images(root, name="torch/cifar10")
    assert data.count_classes() == 10
    data.setup()
    assert data.class_names == list("abcdefghij") and data.dataset_name == "cifar10"
    monkeypatch.undo()
    refuses(
        "root='.*cifar-10-batches-py': .*data.download=true.*; data.root must be the folder that holds cifar-10-batches-py",
        open_images, "torch/cifar10", str(root / "cifar-10-batches-py"), "train", "train_split",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["hfds", "hfids"])
def test_pictures_of_the_hub_keep_their_shades_and_names(tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    deep = Image.fromarray(np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16))
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    rows = {"image": [deep] * 20, "label": [0, 1] * 10}
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / "train-0.parquet")
    options = {
        "img_size": 8,
        "scale": (1, 1),
        "ratio": (1, 1),
        "hflip": 0.0,
        "color_jitter": 0.0,
        "mean": [0] * 3,
        "std": [1] * 3,
    }
    name = f"{kind}/{tmp_path}/set"
    if kind == "hfids":
        options |= {"train_samples": 20, "val_samples": 20, "val_split": "train", "num_classes": 2}
    data, said = set_up(images(tmp_path / "cache", name=name, **options))
    x, _ = next(iter(data.train_dataloader()))
    assert abs(x.mean() - 0.5) < 0.02 and data.dataset_name == "set"
    data.teardown()
    if kind == "hfds":  # it has no part for validation
        assert data.class_names == ["cat", "dog"] and (len(data.train_set), len(data.val_set)) == (18, 2)
        assert len(said) == 1 and "val_split=validation is no part of the set; data.val_fraction=0.1" in said[0]
        refuses("val_split='test': .*test", images(tmp_path / "cache", name=name, val_split="test").setup)
    else:
        refuses("num_classes=None: must be given: hfids/", images(tmp_path / "c", name=name).count_classes)
        without = images(tmp_path / "c2", name=name, num_classes=2, val_split="train")
        refuses("train_samples=None: must be given: hfids/.* does not say how many images it has", without.setup)


@pytest.mark.parametrize("label", [[0, 1], {"boxes": 3}, np.zeros(4), torch.zeros(2)])
def test_several_labels_an_image_are_named_as_unsupported(tmp_path, label):
    data, _ = set_up(images(image_folder(tmp_path)))
    image = picture(np.random.default_rng(0))
    refuses("name='folder': .*several labels or other data .*, which is not supported", data.train_set.picture, image, label, 0)


# ---- MedMNIST


@pytest.mark.parametrize("flag", ["pneumoniamnist", "organamnist", "mine"])
def test_medmnist_counts_its_classes(tmp_path, flag):
    medmnist_npz(tmp_path / f"{flag}.npz", size=28)
    arrays = dict(np.load(tmp_path / f"{flag}.npz"))
    for split in ("train", "val", "test"):
        arrays[f"{split}_labels"] = np.arange(12, dtype=np.uint8)[:, None] % 2
    np.savez(tmp_path / f"{flag}.npz", **arrays)
    data = MedMNIST(str(tmp_path), flag, size=28, batch_size=4, img_size=28)
    assert data.count_classes() == CLASSES.get(flag, 2)
    data.setup()
    assert data.class_names is None or len(data.class_names) == data.num_classes


def test_medmnist_sets_that_do_not_fit_are_named(tmp_path):
    refuses(
        "flag='chestmnist': has several labels an image, which is not supported; take pathmnist", MedMNIST, flag="chestmnist"
    )
    for flag in ("organmnist3d", "nodulemnist3d", "synapsemnist3d"):
        refuses(f"flag='{flag}': holds volumes, which are not supported", MedMNIST, flag=flag)
    medmnist_npz(tmp_path / "own.npz", size=28)
    good = dict(np.load(tmp_path / "own.npz"))
    np.savez(tmp_path / "own.npz", **good | {f"{s}_labels": np.zeros((12, 14), np.uint8) for s in ("train", "val", "test")})
    refuses("root='.*own.npz': has 14 labels an image", MedMNIST(str(tmp_path), "own", size=28, img_size=28).setup)
    np.savez(
        tmp_path / "own.npz", **good | {f"{s}_images": np.zeros((12, 28, 28, 28), np.uint8) for s in ("train", "val", "test")}
    )
    refuses("root='.*own.npz': holds volumes of .28, 28, 28.", MedMNIST(str(tmp_path), "own", size=28, img_size=28).setup)


# ---- what an export is told


def stock(recipe):
    """The transform that a reader of the export builds."""
    from timm.data import create_transform

    return create_transform(is_training=False, **{**recipe, "input_size": (3, *recipe["input_size"][1:])})


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_the_preprocessing_told_is_that_of_validation(tmp_path, crop_pct, interpolation):
    data, _ = set_up(images(image_folder(tmp_path), crop_pct=crop_pct, interpolation=interpolation))
    want = stock(data.preprocessing)(data.val_set._open(3)[0])
    torch.testing.assert_close(data.val_set.fetch(0, [3]).batch[0][0], want)


def test_gray_is_normalised_by_one_mean(tmp_path):
    data, _ = set_up(images(image_folder(tmp_path), in_chans=1, crop_pct=1.0))
    recipe = data.preprocessing
    assert recipe["input_size"] == (1, 16, 16) and len(recipe["mean"]) == len(recipe["std"]) == 1
    gray = data.val_set._open(3)[0].convert("L").convert("RGB")
    want = stock({**recipe, "mean": recipe["mean"] * 3, "std": recipe["std"] * 3})(gray)
    assert (data.val_set.fetch(0, [3]).batch[0][0] - want[:1]).abs().max() < 1.5 / 255 / recipe["std"][0]
    one, _ = set_up(images(tmp_path, in_chans=1, mean=[0.4], std=[0.3]))
    assert one.preprocessing["mean"] == (0.4,) and one.preprocessing["std"] == (0.3,)
    refuses("mean=.*must be 3 numbers, one per colour, or 1", images, tmp_path, mean=[0.1, 0.2])
    refuses("std=.*above 0", images, tmp_path, std=[0.0])


@pytest.mark.parametrize("img_size", [28, 40])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_the_preprocessing_told_of_images_in_memory(img_size, in_chans):
    data = FashionMNIST("sample", batch_size=2, img_size=img_size, in_chans=in_chans)
    data.setup()
    recipe = data.preprocessing
    raw = Image.fromarray(data.val_set.images[5, :, :, 0].numpy()).convert("RGB")
    want = stock({**recipe, "mean": (recipe["mean"] * 3)[:3], "std": (recipe["std"] * 3)[:3]})(raw)[:in_chans]
    assert (data.val_set.fetch(0, [5]).batch[0][0] - want).abs().max() < 1.5 / 255 / recipe["std"][0]
    assert data.class_names[9] == "Ankle boot" and len(data.class_names) == 10


def test_a_run_counts_its_classes(tmp_path):
    seen, _ = fit(images(image_folder(tmp_path)), max_epochs=1)
    assert len(seen) == 6


# ---- web datasets


def test_a_damaged_sample_of_a_web_dataset_is_named(tmp_path):
    pytest.importorskip("webdataset", reason="the package of web datasets is not installed")
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "part-000.tar", "w") as file:
        for i in range(9):
            buffer = io.BytesIO()
            picture(rng).save(buffer, "JPEG")
            content = buffer.getvalue()[: 200 if i == 4 else None]
            for ending, data in (("jpg", content), ("cls", str(i % 2).encode())):
                info = tarfile.TarInfo(f"{i:03d}.{ending}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    options = {"train_split": "part-000.tar|9", "val_split": "part-000.tar|9", "num_classes": 2, "batch_size": 2}
    data, _ = set_up(images(tmp_path, name="wds/", **options))
    take_dropped()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert sum(len(y) for _, y in data.val_dataloader()) == 8
    lines = [str(w.message) for w in caught if "unreadable" in str(w.message)]
    assert len(lines) == 1 and "part-000.tar: 004 (" in lines[0]
    refuses(
        "train_samples=None: must be given", images(tmp_path, name="wds/", **options | {"train_split": "part-000.tar"}).setup
    )


def test_pictures_of_other_names_in_one_part_only(tmp_path):
    found = split_folder(str(image_folder(tmp_path)), {"train_split": "train", "val_split": "validation"}, 0.1, 0)
    assert found.remarks == [] and list(found.parts) == ["train_split", "val_split"]
