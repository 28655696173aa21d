"""Find pictures in folders by class, or in a .tar or .zip of such folders, and split them.

A class is the first folder below the split, as in torchvision; classes are in natural order, so that ``10`` follows ``9``.
"""

import io
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from lowrank_pretrain.core.agreement import generator
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import

with optional_import():
    from PIL import Image

TRAIN = ("train", "training")
EVAL = ("val", "valid", "validation", "eval", "evaluation", "test", "testing")
VALIDATION, TESTS = EVAL[:5], EVAL[5:]
ARCHIVES = (".tar", ".zip")
STUBS = ("MPEG", "HDF5", "WMF", "GRIB", "BUFR", "EPS")  # Pillow knows them, but opens them only with other programs' help
SYSTEM = ("thumbs.db", "desktop.ini", "__macosx")  # files that Windows and macOS leave in any folder


class Member(NamedTuple):
    """Hold one picture: its path below the root, its class, and its place in an archive."""

    path: str
    label: int
    place: tuple[int, int] | None = None  # of a .tar: first byte and size


class Folder:
    """Read a part of the pictures below a root, with ``load(i)``, ``filename(i)`` and ``classes``.

    Args:
        root: a folder or an archive.
        members: the pictures, in order.
        classes: their names, in the order of the labels.
    """

    def __init__(self, root: Path, members: list[Member], classes: list[str]) -> None:
        self.root, self.members, self.classes = root, members, classes
        self._zip: tuple[int, zipfile.ZipFile] | None = None

    def __len__(self) -> int:
        return len(self.members)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}  # an open archive cannot go to another process

    def open(self, i: int) -> BinaryIO:
        """Return the file of picture ``i``."""
        member = self.members[i]
        if member.place is not None:
            with self.root.open("rb") as file:
                file.seek(member.place[0])
                return io.BytesIO(file.read(member.place[1]))
        if self.root.is_file():
            if self._zip is None or self._zip[0] != os.getpid():  # a forked worker must not share its parent's file position
                self._zip = os.getpid(), zipfile.ZipFile(self.root)
            try:
                return io.BytesIO(self._zip[1].read(member.path))
            except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:  # damaged, encrypted, an unknown packing
                raise OSError(str(error)) from error
        return (self.root / member.path).open("rb")

    def load(self, i: int) -> tuple[BinaryIO, int]:
        """Return the file of picture ``i``, and its class."""
        return self.open(i), self.members[i].label

    def filename(self, i: int) -> str:
        """Return the picture's whole path."""
        return str(self.root / self.members[i].path)


class Split(NamedTuple):
    """Hold the parts of a folder, and remarks about them for the user."""

    parts: dict[str, Folder]  # by configuration key
    remarks: list[str]


def image_endings() -> frozenset[str]:
    """Return the endings of the files that Pillow opens by itself, in small letters."""
    Image.init()
    opened = {kind for kind in Image.OPEN if kind not in STUBS}
    return frozenset(ending for ending, kind in Image.registered_extensions().items() if kind in opened)


def split_folder(root: str | None, splits: Mapping[str, str | None], fraction: float, seed: int) -> Split:
    """Find the pictures below ``root`` and divide them.

    Args:
        root: a folder or an archive: ``<split>/<class>/<picture>``, or ``<class>/<picture>`` without splits.
        splits: names of the parts by configuration key: ``train_split``, ``val_split`` and perhaps ``test_split``.
        fraction: share of each class that is held out for validation if there is no validation part.
        seed: chooses them.

    Raises:
        ConfigError: no pictures, no classes, a part that is named but missing.
    """
    path = Path(root) if root is not None else None
    if path is None or not path.exists():
        raise ConfigError(
            "root", root, "must be an existing folder of images, <root>/<class>/<image> or <root>/<split>/<class>/<image>"
        )
    found = find_pictures(path)
    if not found.pictures:
        raise ConfigError("root", root, f"must hold images: Found 0 images there{_count(found.others, ', but ')}")
    named = {name for name in found.tops if name == splits["train_split"] or name.lower() in TRAIN + EVAL}
    # a class may be called train too: a part holds folders, or is the only folder
    parted = (named and named == set(found.tops)) or any(parts[0] in named and len(parts) > 2 for parts, _, _ in found.pictures)
    return (_with_splits if parted else _without_splits)(found, splits, fraction, seed)


class Found(NamedTuple):
    """Hold what was found below a root."""

    root: Path
    pictures: list[tuple[tuple[str, ...], str, tuple[int, int] | None]]  # folders and name, whole path, place
    folders: dict[tuple[str, ...], int]  # folders with files -> the pictures in them
    others: Counter[str]  # other files, by ending
    tops: list[str]  # the folders directly below the root


def find_pictures(path: Path) -> Found:
    """List a folder or an archive, without hidden files and those of the operating system.

    Raises:
        ConfigError: the archive cannot be read.
    """
    wanted, pictures = image_endings(), []
    folders: Counter[tuple[str, ...]] = Counter()
    others: Counter[str] = Counter()
    for name, place in _archive(path) if path.is_file() else _walk(path):
        parts = tuple(name.split("/"))
        if any(part.startswith(".") or part.lower() in SYSTEM for part in parts):
            continue
        ending = os.path.splitext(parts[-1])[1]
        folders[parts[:-1]] += ending.lower() in wanted
        if ending.lower() in wanted:
            pictures.append((parts, name, place))
        else:
            others[ending or "without an ending"] += 1
    top = _common_top(pictures) if path.is_file() else 0
    pictures = [(parts[top:], name, place) for parts, name, place in pictures]
    tops = {parts[top] for parts in folders if len(parts) > top}
    if path.is_dir():
        tops |= {folder.name for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith(".")}
    return Found(path, pictures, {parts[top:]: count for parts, count in folders.items()}, others, natural(tops))


def _with_splits(found: Found, splits: Mapping[str, str | None], fraction: float, seed: int) -> Split:
    remarks = _left_out(found)
    parts: dict[str, Folder] = {}
    used: set[str] = set()
    for key, name in splits.items():
        folder = _part_folder(name, found.tops) if name is not None else None
        if folder is not None:
            used.add(folder)
            below = [(p[1:], whole, place) for p, whole, place in found.pictures if p[0] == folder]
            if not below:
                where = str(found.root / folder)
                raise ConfigError("root", where, f"must hold images: Found 0 images there{_count(found.others, ', but ')}")
            inside = {f[1:]: count for f, count in found.folders.items() if f[:1] == (folder,)}
            parts[key] = _by_class(found.root, below, inside, str(found.root / folder))
        elif name is not None and (key != "val_split" or name not in VALIDATION):
            raise _no_part(key, name, found)
    tests = [top for top in found.tops if top.lower() in TESTS and top not in used]
    if tests and "test_split" not in splits:
        remarks.append(
            f"{found.root}/{tests[0]} is not used: tests are made on the validation part; data.test_split={tests[0]} takes it"
        )
    if "val_split" not in parts and splits.get("val_split") is not None:
        parts["train_split"], parts["val_split"], said = hold_out(parts["train_split"], fraction, seed)
        remarks.append(f"{found.root} has no folder for validation, it has {', '.join(found.tops)}; {said}")
    return Split(parts, remarks)


def _without_splits(found: Found, splits: Mapping[str, str | None], fraction: float, seed: int) -> Split:
    if all(len(parts) > 2 for parts, _, _ in found.pictures):  # folders of folders: of parts that have other names
        raise _no_part("train_split", splits["train_split"], found)
    for key, name in splits.items():
        if name is not None and name not in (TRAIN if key == "train_split" else VALIDATION):
            raise _no_part(key, name, found)
    train, held, said = hold_out(_by_class(found.root, found.pictures, found.folders, str(found.root)), fraction, seed)
    parts = {"train_split": train} | {key: held for key, name in splits.items() if key != "train_split" and name is not None}
    return Split(parts, [*_left_out(found), f"{found.root} has no folders for training and validation; {said}"])


def _by_class(path: Path, below: list, inside: dict[tuple[str, ...], int], where: str) -> Folder:
    flat = sorted(whole for parts, whole, _ in below if len(parts) == 1)
    if flat:
        allowed = (
            f"must hold a folder for each class: {len(flat)} of its {len(below)} images lie outside of any, e.g. {flat[0]}"
        )
        raise ConfigError("root", where, allowed)
    classes = natural({parts[0] for parts, _, _ in below})
    empty = natural({f[0] for f in inside if f} - set(classes))
    if empty:
        allowed = f"must hold images in the folder of each class; no file that Pillow reads is in {', '.join(empty[:5])}"
        raise ConfigError("root", where, allowed)
    number = {name: i for i, name in enumerate(classes)}
    members = [Member(whole, number[parts[0]], place) for parts, whole, place in below]
    return Folder(path, sorted(members, key=lambda member: natural_key(member.path)), classes)


def hold_out(whole: Folder, fraction: float, seed: int) -> tuple[Folder, Folder, str]:
    """Return training and validation parts, with ``fraction`` of each class held out, and a sentence that says so.

    Raises:
        ConfigError: a class has a single picture, or none is left on one side.
    """
    labels = np.array([member.label for member in whole.members])
    chosen = held_out(labels, fraction, seed)
    if not chosen.any() or chosen.all():
        allowed = f"must leave images on both sides: {len(labels)} images in {len(whole.classes)} classes"
        raise ConfigError("val_fraction", fraction, allowed)
    train = Folder(whole.root, [m for m, out in zip(whole.members, chosen, strict=True) if not out], whole.classes)
    held = Folder(whole.root, [m for m, out in zip(whole.members, chosen, strict=True) if out], whole.classes)
    share = f"data.val_fraction={fraction:g} of each class, {len(held):,} of {len(labels):,} images,"
    return train, held, f"{share} is held out for validation"


def held_out(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Choose samples for validation: the same share of each class, at least one where a class has two or more; (N,) bool."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        if len(places) < 2:
            continue
        count = min(len(places) - 1, max(1, round(Fraction(str(fraction)) * len(places))))
        order = torch.randperm(len(places), generator=generator("held out", int(label), seed=seed)).numpy()
        chosen[places[order[:count]]] = True
    return chosen


def natural(names: set[str]) -> list[str]:
    """Sort the names in natural order."""
    return sorted(names, key=natural_key)


def natural_key(name: str) -> list:
    """Return a sorting key under which ``img10`` follows ``img9``."""
    from timm.utils.misc import natural_key

    return natural_key(name)


def _walk(root: Path) -> Iterator[tuple[str, None]]:
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not _leads_back(folder, name))
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in files:
            yield (name if below == "." else f"{below}/{name}"), None


def _leads_back(folder: str, name: str) -> bool:
    """Return whether the folder `name` links to a folder that contains it: its pictures would be found again and again."""
    path = os.path.join(folder, name)
    return os.path.islink(path) and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(path))


def _archive(path: Path) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """List the files of a .tar or .zip with their places.

    Raises:
        ConfigError: it is neither, or packed so that single files cannot be read.
    """
    if path.suffix.lower() not in ARCHIVES:
        raise ConfigError("root", str(path), f"must be a folder of images, or a {' or '.join(ARCHIVES)} of such folders")
    try:
        if path.suffix.lower() == ".zip":
            with zipfile.ZipFile(path) as file:
                yield from ((entry.filename, None) for entry in file.infolist() if not entry.is_dir())
        else:
            with tarfile.open(path, "r:") as file:
                yield from ((m.name.removeprefix("./"), (m.offset_data, m.size)) for m in file if m.isfile())
    except (OSError, tarfile.TarError, zipfile.BadZipFile, ValueError, EOFError) as error:
        raise ConfigError("root", str(path), f"cannot be read as an archive: {error}") from error


def _common_top(pictures: list) -> int:
    """Count the folders that hold all of an archive, such as the one it is named after."""
    top = 0
    while pictures and all(len(parts) > top + 2 for parts, _, _ in pictures):
        names = {parts[top].lower() for parts, _, _ in pictures}
        if len(names) > 1 or names & {*TRAIN, *EVAL}:
            break
        top += 1
    return top


def _part_folder(name: str, tops: list[str]) -> str | None:
    """Return the folder of a part: of that name, or of another word for it."""
    if name in tops:
        return name
    words = next((group for group in (TRAIN, VALIDATION) if name in group), (name,))
    return next((top for word in words for top in tops if top.lower() == word.lower()), None)


def _no_part(key: str, name: str | None, found: Found) -> ConfigError:
    folders = ", ".join(found.tops[:10]) or "no folders at all"
    return ConfigError(key, name, f"must be a folder under {found.root}, there are: {folders}")


def _count(kinds: Counter[str], before: str = "") -> str:
    said = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(8))
    rest = len(kinds) - 8
    return f"{before}{said}{f' and {rest} other kinds' if rest > 0 else ''}" if kinds else ""


def _left_out(found: Found) -> list[str]:
    total = sum(found.others.values())
    files = f"{total:,} file{'s' * (total > 1)}"
    return [f"{found.root}: {files} left out that Pillow does not read as images: {_count(found.others)}"] if total else []
