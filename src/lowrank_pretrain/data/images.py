"""Real image sets: folders, torchvision sets, hub sets and streams, with timm's transforms and random augmentation.

The defaults are those of timm's training script; ``conf/data/imagenet.yaml`` has PreLoRA's, ``images.yaml`` AugReg's
("How to train your ViT", https://arxiv.org/abs/2106.10270). Shapes: B batch, C channels, S side in pixels, K classes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lowrank_pretrain.data.arrays import check_shape
from lowrank_pretrain.data.base import PretrainData
from lowrank_pretrain.data.loaders import EpochLoader
from lowrank_pretrain.data.mixing import Mixing
from lowrank_pretrain.data.pictures import MapImages, Picture, StreamImages
from lowrank_pretrain.data.sources import STREAMS, open_images
from lowrank_pretrain.data.stream_loaders import PassLoader, StreamLoader
from lowrank_pretrain.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageData(PretrainData):
    """Any image set that timm or torchvision opens, with timm's augmentation.

    Args:
        root: folder of the data.
        name: ``folder``, ``torch/cifar10``, ``torch/caltech256``, ``hfds/…``, ``wds/`` …: :func:`~.sources.open_images`.
        train_split: name of the training part.
        val_split: name of the validation part.
        test_split: None: the validation part.
        download: let torchvision fetch a missing set.
        batch_size: images per batch and process.
        num_workers: loading processes.
        num_classes: K, at least the number of classes in the set.
        img_size: side of the images handed out, pixels.
        in_chans: 1 or 3.
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
        mixup: alpha; 0 is off. This and the next four: :class:`~lowrank_pretrain.data.mixing.Mixing`.
        cutmix: alpha; 0 is off.
        mix_prob: share of mixed batches.
        switch_prob: share of CutMix among them where both are on.
        smoothing: label smoothing.
        train_samples: images in a training pass of a stream that does not say so itself.
        val_samples: likewise for validation.
        seed: None: the run's.

    Raises:
        ConfigError: a wrong value, or (from ``setup``) data that is missing or does not fit.
    """

    def __init__(
        self,
        root: str | None = None,
        name: str = "folder",
        train_split: str = "train",
        val_split: str = "validation",
        test_split: str | None = None,
        download: bool = False,
        batch_size: int = 64,
        num_workers: int = 4,
        num_classes: int = 1000,
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
        super().__init__(batch_size, num_workers, seed)
        check_shape(img_size, in_chans, num_classes)
        self.root, self.name, self.download = root, name, download
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.num_classes, self.img_size, self.in_chans = num_classes, img_size, in_chans
        self.train_samples, self.val_samples = train_samples, val_samples
        self.mixing = Mixing(num_classes, mixup, cutmix, mix_prob, switch_prob, smoothing, seed)
        self.mixing.check(batch_size)
        common = {"interpolation": interpolation, "mean": tuple(mean), "std": tuple(std)}
        train = {"scale": tuple(scale), "ratio": tuple(ratio), "hflip": hflip, "vflip": vflip, "re_prob": re_prob}
        train |= {"color_jitter": color_jitter, "auto_augment": auto_augment}
        self.train_transform = {"is_training": True} | common | train
        self.eval_transform = {"crop_pct": crop_pct, **common}
        if interpolation == "random":  # of training only
            self.eval_transform["interpolation"] = "bicubic"

    def setup(self, stage: str | None = None) -> None:
        """Open the sets, once."""
        if self.train_set is not None:
            return
        test_key = "val_split" if self.test_split is None else "test_split"
        splits = (("train_split", self.train_split), ("val_split", self.val_split), (test_key, self.test_split))
        sets = [self._open(key, split) for key, split in splits if split is not None]
        self.train_set, self.val_set, self.test_set = *sets[:2], sets[-1]
        orders = [getattr(getattr(s.base, "reader", None), "class_to_idx", None) for s in sets if isinstance(s, MapImages)]
        if any(order != orders[0] for order in orders):
            few = sorted(set(orders[0]) ^ set(next(order for order in orders if order != orders[0])))[:5]
            raise ConfigError("val_split", self.val_split, f"must have the classes of {self.train_split}; not in both: {few}")

    def _open(self, key: str, split: str) -> MapImages | StreamImages:
        training = key == "train_split"
        picture = Picture(self._transform(training), self.num_classes, self.in_chans, training, self.seed)
        mixing = self.mixing if training and self.mixing.active else None
        if self.name.partition("/")[0] in STREAMS:
            return self._open_stream(key, split, picture, mixing)
        base = open_images(self.name, self.root, split, key, self.download)
        classes = getattr(getattr(base, "reader", None), "class_to_idx", None) or getattr(base, "classes", ())
        if len(classes) > self.num_classes:
            raise ConfigError("num_classes", self.num_classes, f"must be at least {len(classes)}, the classes of {split}")
        if len(base) == 0:
            raise ConfigError(key, split, f"must hold at least one image; {self.root} has none there")
        return MapImages(base, picture, mixing)

    def _open_stream(self, key: str, split: str, picture: Picture, mixing: Mixing | None) -> StreamImages:
        training = key == "train_split"
        size_key, size = ("train_samples", self.train_samples) if training else ("val_samples", self.val_samples)
        options = {"is_training": training, "batch_size": self.batch_size, "num_samples": size}
        open_pass = partial(_open_pass, (self.name, self.root, split, key), options, self.seed or 0)
        try:
            size = len(open_pass(0))
        except (TypeError, RuntimeError) as error:
            raise ConfigError(size_key, size, "must be given: the set does not say its size") from error
        return StreamImages(self.name, open_pass, size, picture, self.batch_size, self.ranks[0], mixing, endless=training)

    def _transform(self, training: bool) -> Callable:
        from timm.data import create_transform

        options = self.train_transform if training else self.eval_transform
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


def _open_pass(source: tuple[str, str | None, str, str], options: dict[str, Any], seed: int, number: int) -> Any:
    # opened anew for each pass, the stream draws the same order again, so a pass can be read up to any place of it
    stream = open_images(*source, **options, seed=seed + number)
    if hasattr(stream, "set_epoch"):
        stream.set_epoch(number)
    return stream
