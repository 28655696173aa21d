"""Open image sets by name: with timm's ``create_dataset``, and the torchvision sets that it leaves out; errors in one line.

Splits are checked here as well: ``create_dataset`` silently falls back to the whole folder, or to the test split.
"""

import inspect
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import missing_module, missing_words, optional_import
from lowrank_pretrain.core.text import first_line
from lowrank_pretrain.data.images.folders import EVAL, TRAIN, VALIDATION, held_out

TIMM_TORCH = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist", "imagenet", "image_folder", "places365")
STREAMS = ("hfids", "wds", "tfds")
HOLD_OUT = 10  # every 10th image of a torchvision set without splits is for validation


class HubImages:
    """Read a hub set that is fully downloaded, through timm's reader.

    Args:
        base: timm's set.
    """

    def __init__(self, base: Any) -> None:
        self.reader = base.reader
        self.classes = list(self.reader.class_to_idx) or None

    def __len__(self) -> int:
        return len(self.reader)

    def load(self, i: int) -> tuple[BinaryIO, Any]:
        """Return the file of picture ``i``, and its label."""
        return self.reader[i][:2]

    def filename(self, i: int) -> str:
        """Return the picture's name."""
        return str(self.reader.filename(i, absolute=True))

    def labels(self) -> np.ndarray:
        """Return all labels, (N,)."""
        return np.asarray(self.reader.dataset[self.reader.label_key])


class TorchvisionImages:
    """Read a set of torchvision's.

    Args:
        base: the set.
    """

    def __init__(self, base: Any) -> None:
        self.base = base
        whole = getattr(base, "dataset", base)  # of a Subset
        classes = getattr(whole, "classes", None) or getattr(whole, "categories", None)
        self.classes = [" or ".join(name) if isinstance(name, (tuple, list)) else str(name) for name in classes or ()] or None

    def __len__(self) -> int:
        return len(self.base)

    def load(self, i: int) -> tuple[Any, Any]:
        """Return picture ``i``, opened, and its label."""
        return self.base[i][:2]

    def filename(self, i: int) -> str:
        """Return the picture's name, or its number where the set has no files."""
        samples = getattr(self.base, "samples", None)
        return str(samples[i][0]) if samples else f"{type(self.base).__name__}[{i}]"


class Part:
    """Read some pictures of another set.

    Args:
        whole: the set.
        places: which ones.
    """

    def __init__(self, whole: HubImages, places: Sequence[int]) -> None:
        self.whole, self.places, self.classes = whole, list(places), whole.classes

    def __len__(self) -> int:
        return len(self.places)

    def load(self, i: int) -> tuple[BinaryIO, Any]:
        """Return the file of picture ``i`` of this part, and its label."""
        return self.whole.load(self.places[i])

    def filename(self, i: int) -> str:
        """Return the picture's name."""
        return self.whole.filename(self.places[i])


def open_images(name: str, root: str | None, split: str, split_key: str, download: bool = False, **kwargs: Any) -> Any:
    """Open a set of images, with ``load(i)``, ``filename(i)`` and ``classes``, or (``hfids/``, ``wds/``, ``tfds/``) a stream.

    Args:
        name: ``torch/<torchvision set>``, ``hfds/<name>``, or a stream: ``hfids/<name>``, ``wds/``, ``tfds/<name>``. A name of
            the hub may be a folder of this machine: ``hfds//abs/path``. Folders: :mod:`~lowrank_pretrain.data.images.folders`.
        root: folder of the data; for ``hfds/`` the cache.
        split: which part.
        split_key: the configuration key that named it.
        download: let torchvision fetch a missing set.
        kwargs: passed to ``timm.data.create_dataset``.

    Raises:
        ConfigError: unknown name, no data at ``root``, or no such split.
    """
    prefix, _, rest = name.partition("/")
    if prefix not in ("torch", "hfds", *STREAMS) or (not rest and prefix != "wds"):
        allowed = "must be folder, torch/<torchvision set>, hfds/<hub set>, hfids/<hub set>, wds/ or tfds/<set>"
        raise ConfigError("name", name, allowed)
    if prefix != "hfds" and prefix != "hfids" and (root is None or not (download or Path(root).is_dir())):
        raise ConfigError("root", root, "must be an existing folder with the data")
    if prefix == "torch":
        return TorchvisionImages(_torchvision(rest.lower(), root, split, split_key, download))
    with optional_import("name", name):
        from timm.data import create_dataset

    if prefix == "wds":
        _name_what_webdataset_drops()
    try:
        opened = create_dataset(name, root=root, split=split, input_img_mode="", **kwargs)
        return HubImages(opened) if prefix == "hfds" else opened
    except ImportError as error:
        module = missing_module(error)
        needed = f"needs a package that is not installed: {error}" if module is None else missing_words(module)
        raise ConfigError("name", name, needed) from error
    except ValueError as error:  # datasets: 'Unknown split "x". Should be one of [...]'
        if "num_samples" in str(error):
            key = "train_samples" if split_key == "train_split" else "val_samples"
            raise ConfigError(key, None, f"must be given: {name} does not say how many images it has") from error
        raise ConfigError(split_key, split, first_line(error)) from error
    except Exception as error:  # each library has its own for no network, no such set, no such file
        key, value = ("root", root) if prefix == "wds" else ("name", name)
        text = first_line(error)
        if prefix == "wds" and "num_samples not specified" in text:
            raise ConfigError("train_samples", None, f"must be given: {root} does not say how many images it has") from error
        if prefix == "wds" and "not found in info" in text:
            allowed = "must be a part in its info.json, or shards such as train-{0000..0099}.tar"
            raise ConfigError(split_key, split, allowed) from error
        raise ConfigError(key, value, f"cannot be opened: {text}") from error


def hold_out_of_hub(train: HubImages, val_split: str, fraction: float, seed: int, error: ConfigError) -> tuple[Part, Part, str]:
    """Return training and validation parts of a hub set without a validation part, and a sentence that says so.

    Raises:
        ConfigError: ``error``, if the part asked for is not simply "the validation part".
    """
    if val_split not in VALIDATION or "split" not in str(error).lower():
        raise error
    chosen = held_out(train.labels(), fraction, seed)
    if not chosen.any() or chosen.all():
        raise ConfigError("val_fraction", fraction, f"must leave images on both sides: there are {len(train):,}")
    part, held_out_part = (Part(train, np.flatnonzero(chosen == side).tolist()) for side in (False, True))
    held = f"{len(held_out_part):,} of {len(train):,} images, is held out for validation"
    said = f"data.val_split={val_split} is no part of the set; data.val_fraction={fraction:g} of each class, {held}"
    return part, held_out_part, said


_dropped: list[str] = []  # what webdataset left out in this process, until it is fetched


def take_dropped() -> list[str]:
    """Return the samples of web datasets that could not be read since the last call, in this process."""
    taken = list(_dropped)
    _dropped.clear()
    return taken


def _name_what_webdataset_drops() -> None:
    """Make timm's reader report which samples it leaves out: its own message names neither shard nor sample."""
    from timm.data.readers import reader_wds as reader

    reader_wds: Any = reader  # two of its functions are replaced, and a name is added
    if getattr(reader_wds, "named_by_us", False):
        return
    decode, go_on = reader_wds._decode, reader_wds.log_and_continue

    def named_decode(sample: dict[str, Any], **options: Any) -> Any:
        try:
            return decode(sample, **options)
        except Exception as error:  # PIL has many; timm's own handler raises configuration errors again
            _dropped.append(f"{sample.get('__url__')}: {sample.get('__key__')} ({error})")
            raise

    def counted(error: Exception) -> bool:
        logger = logging.getLogger(reader_wds.__name__)
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            if not _dropped:  # not a sample but a shard
                _dropped.append(first_line(error))
            return go_on(error)
        finally:
            logger.setLevel(level)

    reader_wds._decode, reader_wds.log_and_continue, reader_wds.named_by_us = named_decode, counted, True
    logging.getLogger(reader_wds.__name__).addFilter(_Once())


class _Once(logging.Filter):
    """Let each message through once."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.getMessage() not in self.said
        self.said.add(record.getMessage())
        return new


def _torchvision(name: str, root: str | None, split: str, split_key: str, download: bool) -> Any:
    with optional_import("name", name):
        from timm.data import create_dataset
        from torchvision import datasets

    known = {c.lower(): getattr(datasets, c) for c in datasets.__all__ if inspect.isclass(getattr(datasets, c))}
    cls: Any = known.get(name.replace("_", ""))
    if cls is None and name not in TIMM_TORCH:
        raise ConfigError("name", f"torch/{name}", f"must be one of torch/{', torch/'.join(sorted(known))}")
    if split not in TRAIN + EVAL and (name in TIMM_TORCH or "split" not in inspect.signature(cls).parameters):
        raise ConfigError(split_key, split, f"must be one of {', '.join(TRAIN + EVAL)}")
    try:
        if name in TIMM_TORCH:
            return create_dataset(f"torch/{name}", root=root, split=split, download=download)
        return _other_torchvision(cls, root, split, split_key, download)
    except (RuntimeError, OSError) as error:  # "Dataset not found or corrupted. You can use download=True to download it"
        text = first_line(error).replace("download=True", "data.download=true")
        raise ConfigError("root", root, f"{text}{_one_too_deep(root)}") from error


def _other_torchvision(cls: type, root: str | None, split: str, split_key: str, download: bool) -> Any:
    from torch.utils.data import Subset

    parameters = inspect.signature(cls).parameters
    kwargs = {"root": root} | ({"download": download} if "download" in parameters else {})
    if "split" in parameters:
        names = EVAL if split in EVAL else TRAIN if split in TRAIN else ()
        refusal: ValueError | None = None
        for alias in dict.fromkeys((split, *names)):  # the set's own name for it
            try:
                return cls(split=alias, **kwargs)
            except ValueError as error:
                refusal = refusal or error
        raise ConfigError(split_key, split, first_line(refusal)) from refusal
    if "train" in parameters:
        return cls(train=split in TRAIN, **kwargs)
    whole = cls(**kwargs)  # Caltech256, SUN397: no splits
    held = range(HOLD_OUT - 1, len(whole), HOLD_OUT)
    return Subset(whole, [i for i in range(len(whole)) if i not in held] if split in TRAIN else list(held))


def _one_too_deep(root: str | None) -> str:
    """Return a hint to use the parent folder, if the folder of the set itself was given."""
    parts = ("cifar-10-batches-py", "cifar-100-python", "raw", "FashionMNIST", "MNIST", "caltech101", "caltech256")
    name = Path(root or "").resolve().name
    return f"; data.root must be the folder that holds {name}, not {name} itself" if name in parts else ""
