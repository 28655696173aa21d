"""Load real image sets (folders, torchvision sets, hub sets, streams) with timm's transforms and random augmentation.

The defaults are those of timm's training script; ``conf/data/imagenet.yaml`` has PreLoRA's, ``images.yaml`` AugReg's
("How to train your ViT", https://arxiv.org/abs/2106.10270). Shapes: B batch, C channels, S side in pixels, K classes.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from lowrank_pretrain.core.checks import choice, is_number, number
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.data.images.files import MapImages, Picture, StreamImages
from lowrank_pretrain.data.images.folders import split_folder
from lowrank_pretrain.data.images.mixing import Mixing
from lowrank_pretrain.data.images.module import ImageModule
from lowrank_pretrain.data.images.sources import STREAMS, HubImages, hold_out_of_hub, open_images
from lowrank_pretrain.data.loaders.base import evaluation_recipe, for_channels, public_name
from lowrank_pretrain.data.loaders.epoch import EpochLoader
from lowrank_pretrain.data.loaders.stream import PassLoader, StreamLoader

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "box", "hamming", "random")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageData(ImageModule):
    """Load any image set that timm or torchvision opens, with timm's augmentation.

    Args:
        root: folder of the data.
        name: ``folder``, ``torch/cifar10``, ``torch/caltech256``, ``hfds/…``, ``wds/`` …: :func:`~.sources.open_images`.
        train_split: name of the training part.
        val_split: name of the validation part.
        test_split: None: the validation part.
        val_fraction: share of each class that is held out for validation, if a folder or a hub set has no validation part. The
            same images for any run seed; ``seed`` draws others.
        download: let torchvision fetch a missing set.
        scale: area of the random crop as a share of the image, smallest and largest.
        ratio: its width to height, smallest and largest.
        hflip: probability of mirroring.
        vflip: probability of turning upside down.
        color_jitter: strength; 0 is off, and auto_augment replaces it.
        auto_augment: timm's string, e.g. ``rand-m9-n2`` for RandAugment(2, 9); None is off.
        re_prob: probability of erasing a rectangle.
        interpolation: ``bilinear``, ``bicubic`` or ``random``.
        crop_pct: validation takes this share of the image's middle.
        mean: per channel.
        std: per channel.
        train_samples: images in a training pass of a stream that does not give its own size.
        val_samples: the same for validation.

    All other arguments are described at :class:`~lowrank_pretrain.data.images.module.ImageModule`.

    Raises:
        ConfigError: a wrong value, or (from ``setup``) data that is missing or does not fit.
    """

    name: str  # Lightning declares one that may be None

    def __init__(
        self,
        root: str | None = None,
        name: str = "folder",
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str | None = None,
        val_fraction: float = 0.1,
        download: bool = False,
        batch_size: int = 64,
        num_workers: int = 4,
        num_classes: int | None = None,
        img_size: int = 224,
        in_chans: int = 3,
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (0.75, 1.3333),
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float = 0.4,
        auto_augment: str | None = None,
        re_prob: float = 0.0,
        interpolation: str = "bicubic",
        crop_pct: float = 0.875,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        switch_prob: float = 0.5,
        smoothing: float = 0.0,
        train_samples: int | None = None,
        val_samples: int | None = None,
        seed: int | None = None,
    ) -> None:
        mixing = mixup, cutmix, mix_prob, switch_prob, smoothing
        super().__init__(batch_size, num_workers, num_classes, img_size, in_chans, mixing, seed)
        number("val_fraction", val_fraction, above=0, below=1, allowed="must be a share above 0 and below 1")
        _check_augmentation(
            {"hflip": hflip, "vflip": vflip, "re_prob": re_prob}, color_jitter, crop_pct, interpolation, scale, ratio
        )
        self.root, self.name, self.download, self.val_fraction = root, name, download, val_fraction
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.train_samples, self.val_samples = train_samples, val_samples
        mean, std = _channel_values("mean", mean), _channel_values("std", std)
        self.dataset_name = public_name(root or "images" if name in ("", "folder", "wds/") else name.partition("/")[2])
        common: dict[str, Any] = {"interpolation": interpolation}
        # gray images are normalised by one mean, so that converting them to gray first gives the same result
        common |= {key: for_channels(for_channels(v, in_chans), 3) for key, v in (("mean", mean), ("std", std))}
        train: dict[str, Any] = {
            "scale": tuple(scale),
            "ratio": tuple(ratio),
            "hflip": hflip,
            "vflip": vflip,
            "re_prob": re_prob,
        }
        train |= {"color_jitter": color_jitter, "auto_augment": auto_augment}
        self.train_transform = {"is_training": True} | common | train
        fixed = "bicubic" if interpolation == "random" else interpolation  # random in training only
        self.eval_transform = {"crop_pct": crop_pct, **common, "interpolation": fixed}
        self.preprocessing = evaluation_recipe(img_size, in_chans, mean, std, fixed, crop_pct, "center")
        self._bases: dict[str, Any] | None = None  # the opened sets, by key

    def count_classes(self) -> int:
        """Return the number of classes, counted in the training part if it was not given.

        Raises:
            ConfigError: missing data, or a stream, whose classes cannot be counted.
        """
        if self.num_classes is None and self.name.partition("/")[0] not in STREAMS:
            base = self._open_all()["train_split"]
            labels = base.labels() if not base.classes and hasattr(base, "labels") else np.empty(0)
            counted = 1 + int(labels.max()) if labels.dtype.kind in "iu" and labels.ndim == 1 and labels.size else None
            self.num_classes = len(base.classes) if base.classes else counted
        if self.num_classes is None:
            raise ConfigError("num_classes", None, f"must be given: {self.name} does not say how many classes it has")
        return self.num_classes

    def setup(self, stage: str | None = None) -> None:
        """Open the sets, once."""
        if self.train_set is not None:
            return
        mixing = self.mixing(self.count_classes())
        sets: dict[str, Any]
        if self.name.partition("/")[0] in STREAMS:
            sets = {key: self._open_stream(key, split, mixing) for key, split in self._splits().items()}
        else:
            bases = self._open_all()
            self.class_names = bases["train_split"].classes
            sets = {key: self._set(key, base, mixing) for key, base in bases.items()}
        self.train_set, self.val_set = sets["train_split"], sets["val_split"]
        self.test_set = sets.get("test_split", self.val_set)

    def _splits(self) -> dict[str, str]:
        splits = {"train_split": self.train_split, "val_split": self.val_split, "test_split": self.test_split}
        return {key: split for key, split in splits.items() if split is not None}

    def _open_all(self) -> dict[str, Any]:
        """Open the parts by key, once. One process warns of what was left out or held out."""
        if self._bases is not None:
            return self._bases
        remarks: list[str] = []
        if self.name in ("", "folder"):
            bases, remarks = split_folder(self.root, self._splits(), self.val_fraction, self.seed or 0)
        else:
            bases = {}
            for key, split in self._splits().items():
                try:
                    bases[key] = open_images(self.name, self.root, split, key, self.download)
                except ConfigError as error:
                    if key != "val_split" or not isinstance(bases["train_split"], HubImages):
                        raise
                    held = hold_out_of_hub(bases["train_split"], split, self.val_fraction, self.seed or 0, error)
                    bases["train_split"], bases["val_split"] = held[:2]
                    remarks.append(held[2])
        for key, base in bases.items():
            if base.classes != bases["train_split"].classes:
                few = sorted(set(bases["train_split"].classes or ()) ^ set(base.classes or ()))[:5]
                split = self._splits()[key]
                raise ConfigError(key, split, f"must have the classes of {self.train_split}; not in both: {few}")
        for remark in remarks if getattr(rank_zero_only, "rank", 0) == 0 else ():
            warnings.warn(remark, stacklevel=1)
        self._bases = bases
        return bases

    def _set(self, key: str, base: Any, mixing: Mixing) -> MapImages:
        split, training = self._splits()[key], key == "train_split"
        if len(base.classes or ()) > self.count_classes():
            raise ConfigError("num_classes", self.num_classes, f"must be at least {len(base.classes)}, the classes of {split}")
        if len(base) == 0:
            raise ConfigError(key, split, f"must hold at least one image; {self.root} has none there")
        return MapImages(base, self._picture(training), mixing if training and mixing.active else None)

    def _picture(self, training: bool) -> Picture:
        return Picture(self._transform(training), self.count_classes(), self.in_chans, training, self.seed, self.name)

    def _open_stream(self, key: str, split: str, mixing: Mixing) -> StreamImages:
        training = key == "train_split"
        mixed = mixing if training and mixing.active else None
        size_key, size = ("train_samples", self.train_samples) if training else ("val_samples", self.val_samples)
        options = {"is_training": training, "batch_size": self.batch_size, "num_samples": size}
        open_pass = partial(_open_pass, (self.name, self.root, split, key), options, self.seed or 0)
        try:
            size = len(open_pass(0))
        except (TypeError, RuntimeError) as error:
            raise ConfigError(size_key, size, "must be given: the set does not say its size") from error
        picture = self._picture(training)
        return StreamImages(self.name, open_pass, size, picture, self.batch_size, self.ranks[0], mixed, endless=training)

    def _transform(self, training: bool) -> Callable:
        with optional_import():
            from timm.data import create_transform

        options: dict[str, Any] = self.train_transform if training else self.eval_transform
        try:
            return create_transform(input_size=(3, self.img_size, self.img_size), **options)
        except (AssertionError, KeyError, ValueError) as error:
            value = options.get("auto_augment")
            allowed = f"must be timm's string for an augmentation, e.g. rand-m9-n2 ({type(error).__name__} {error})"
            raise ConfigError("auto_augment", value, allowed) from error

    def _make_train_loader(self) -> EpochLoader | StreamLoader:
        if not isinstance(self.train_set, StreamImages):
            return super()._make_train_loader()
        rank, world = self.ranks
        batches = max(1, self.train_set.size // (self.batch_size * world))
        return StreamLoader(self.train_set, batches, self.num_workers, rank, world)

    def _make_loader(self, dataset: Any, shuffle: bool) -> Any:
        if isinstance(dataset, StreamImages):
            return PassLoader(dataset, self.num_workers)
        return super()._make_loader(dataset, shuffle)


def _check_augmentation(
    shares: dict[str, float],
    color_jitter: float,
    crop_pct: float,
    interpolation: str,
    scale: Sequence[float],
    ratio: Sequence[float],
) -> None:
    """Refuse values that timm accepts although they cannot mean anything.

    Raises:
        ConfigError: one of them.
    """
    for key, value in shares.items():
        number(key, value, least=0, most=1, allowed="must be a probability, 0 to 1")
    number("color_jitter", color_jitter, least=0, most=1, allowed="must be a strength from 0 (off) to 1")
    number("crop_pct", crop_pct, above=0, most=1, allowed="must be a share above 0, at most 1")
    choice("interpolation", interpolation, INTERPOLATIONS)
    for key, pair, most in (("scale", scale, 1), ("ratio", ratio, float("inf"))):
        if len(pair) != 2 or not all(map(is_number, pair)) or not 0 < pair[0] <= pair[1] <= most:
            words = "two shares of the area, the smaller first" if key == "scale" else "two positive numbers, the smaller first"
            raise ConfigError(key, list(pair), f"must be {words}")


def _channel_values(key: str, values: Sequence[float]) -> tuple[float, ...]:
    values = tuple(values)
    if len(values) not in (1, 3) or not all(map(is_number, values)) or (key == "std" and min(values) <= 0):
        raise ConfigError(key, list(values), "must be 3 numbers, one per colour, or 1" + (", above 0" if key == "std" else ""))
    return values


def _open_pass(source: tuple[str, str | None, str, str], options: dict[str, Any], seed: int, number: int) -> Any:
    # a stream that is opened again for each pass draws the same order, so a pass can be replayed up to any place
    stream = open_images(*source, **options, seed=seed + number)
    if hasattr(stream, "set_epoch"):
        stream.set_epoch(number)
    return stream
