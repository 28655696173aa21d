"""Make batches of PIL images, from a map-style set or a stream; each image is augmented from its own seed.

Shapes: B batch, C channels, S side in pixels, K classes.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.core.text import first_line
from lowrank_pretrain.data.images.arrays import with_channels
from lowrank_pretrain.data.images.mixing import Mixing
from lowrank_pretrain.data.images.sources import take_dropped
from lowrank_pretrain.data.loaders.batch import Fetched
from lowrank_pretrain.data.loaders.rng import borrowed, reseed

with optional_import():
    from PIL import ExifTags, Image, ImageOps

# what PIL raises for a file that is not an image, is truncated, or would fill the memory
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
MAX_REPLACEMENTS = 1000  # images in a row that may be unreadable


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return a picture as people see it: its first frame, rotated as EXIF says, with 8 bits for each of three colours.

    Pillow's own ``convert("RGB")`` clips pixels of 16 or 32 bits at 255, which makes most of such a picture white.
    """
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except UNREADABLE:  # damaged metadata of a picture that may be whole
        turned = False
    image = ImageOps.exif_transpose(image) if turned else image
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    elif "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")  # as Pillow asks for
    image.load()  # `convert` would copy what is RGB already
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a gray picture of 16 or 32 bits, or of floating point, to 8 bits."""
    pixels = np.asarray(image).astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError("pixels that are NaN or infinite")
    if image.mode == "F":
        top = 1.0 if pixels.max(initial=0) <= 1 else 255.0 if pixels.max() <= 255 else 65535.0
    else:
        top = 65535.0 if pixels.max(initial=0) <= 65535 else 4294967295.0
    return Image.fromarray(np.clip(np.rint(pixels * (255 / top)), 0, 255).astype(np.uint8))


class Picture:
    """Turn an image into a tensor: at random when training, from its own seed.

    Args:
        transform: timm's, PIL image -> (3, S, S) float.
        num_classes: K; labels must be below it.
        in_chans: 1 or 3.
        training: seed before each image.
        seed: the run's.
        name: of the set, for errors.
    """

    def __init__(
        self, transform: Callable, num_classes: int, in_chans: int, training: bool, seed: int | None, name: str = ""
    ) -> None:
        self.transform, self.num_classes, self.in_chans, self.name = transform, num_classes, in_chans, name
        self.training, self.seed = training, seed

    def __call__(self, image: Image.Image, label: Any, *words: object) -> tuple[torch.Tensor, int]:
        """Return the image (in_chans, S, S) and its label; only inside :func:`~lowrank_pretrain.data.loaders.rng.borrowed`."""
        if isinstance(label, (list, tuple, dict)) or getattr(label, "ndim", False):
            allowed = f"gives an image several labels or other data ({type(label).__name__}), which is not supported"
            raise ConfigError("name", self.name, f"{allowed}: take a set of one class an image")
        if not hasattr(label, "__index__") or not 0 <= int(label) < self.num_classes:
            raise ConfigError(
                "num_classes", self.num_classes, f"must be above every label (whole numbers from 0), found {label!r}"
            )
        if self.training:
            reseed("augment", *words, seed=self.seed)
        return self.transform(upright_rgb(image)), int(label)

    def batch(self, pictures: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (B, in_chans, S, S) float32 and labels (B,) int64."""
        x = torch.stack([x for x, _ in pictures])
        return with_channels(x, self.in_chans), torch.tensor([y for _, y in pictures])


class MapImages:
    """Fetch batches of a map-style set of PIL images; the next readable image replaces an unreadable one, which is named.

    Args:
        base: ``load(i)`` gives a file or a PIL image, and the class; ``filename(i)`` its name.
        picture: turns an image into a tensor.
        mixing: mixup, CutMix or label smoothing, for training only.
    """

    def __init__(self, base: Any, picture: Picture, mixing: Mixing | None = None) -> None:
        self.base, self.picture, self.mixing = base, picture, mixing
        self._unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.base)

    def fetch(self, epoch: int, indices: list[int]) -> Fetched:
        """Return images (B, in_chans, S, S) float32 and labels: (B,) int64, or (B, K) float when mixing."""
        bad: list[str] = []
        with borrowed():
            pictures = [self.picture(*self._load(i, bad), epoch, i) for i in indices]
        x, y = self.picture.batch(pictures)
        if self.mixing:
            x, y = self.mixing(x, y, epoch, indices[0])
        return Fetched((x, y), bad)

    def _load(self, index: int, bad: list[str]) -> tuple[Image.Image, int]:
        tries = min(len(self), MAX_REPLACEMENTS)
        for i in (k % len(self) for k in range(index, index + tries)):
            if i not in self._unreadable:
                try:
                    return self._open(i)
                except UNREADABLE as error:
                    self._unreadable[i] = f"{self.base.filename(i)} ({str(error) or type(error).__name__})"
            bad.append(self._unreadable[i])
        allowed = f"must hold images that can be read; {tries} in a row cannot: {bad[-1]}"
        raise ConfigError("root", self.base.filename(index), allowed)

    def _open(self, i: int) -> tuple[Image.Image, Any]:
        source, label = self.base.load(i)
        if isinstance(source, Image.Image):
            return upright_rgb(source), label
        with source:
            return upright_rgb(Image.open(source)), label


class StreamImages(IterableDataset):
    """Stream batches of PIL images; endless for training, one pass for validation.

    Resuming reads the current pass again up to its place, without transforming the images: streams of files cannot seek.

    Args:
        name: of the set, for errors.
        open_pass: number of the pass -> iterable of (PIL image, class), split among workers and ranks by timm.
        size: images in a pass, of all readers together.
        picture: turns an image into a tensor.
        batch_size: B.
        rank: this process, part of the seed of its images.
        mixing: mixup, CutMix or label smoothing.
        endless: begin another pass at the end, and drop a batch that is not full.
    """

    def __init__(
        self,
        name: str,
        open_pass: Callable[[int], Any],
        size: int,
        picture: Picture,
        batch_size: int,
        rank: int = 0,
        mixing: Mixing | None = None,
        endless: bool = True,
    ) -> None:
        self.name, self.open_pass, self.size, self.picture = name, open_pass, size, picture
        self.batch_size, self.rank = batch_size, rank
        self.mixing, self.endless = mixing, endless
        self._place = {"pass": 0, "images": 0}

    def state_dict(self) -> dict[str, int]:
        """Return the pass, and the images used of it."""
        return dict(self._place)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration at ``state``."""
        self._place = dict(state)

    def __iter__(self) -> Iterator[Fetched]:
        try:
            yield from self._batches()
        except ConfigError as error:
            yield Fetched(None, [], error)
        except Exception as error:  # carried to the training process; each reading library has its own class
            yield Fetched(None, [], ConfigError("name", self.name, f"cannot be read: {first_line(error)}"))

    def _batches(self) -> Iterator[Fetched]:
        worker = get_worker_info()
        reader = (self.rank, worker.id if worker else 0)
        number, skip = (self._place["pass"], self._place["images"]) if self.endless else (0, 0)
        while True:
            pictures: list[tuple[torch.Tensor, int]] = []
            seen = 0
            take_dropped()
            for seen, (image, label) in enumerate(self.open_pass(number), 1):
                if seen <= skip:
                    continue
                with borrowed():
                    pictures.append(self.picture(image, label, number, *reader, seen))
                if len(pictures) == self.batch_size:
                    self._place = {"pass": number, "images": seen}
                    yield self._batch(pictures, number, *reader, seen)
                    pictures = []
            if not self.endless:
                if pictures:
                    yield self._batch(pictures)
                return
            if seen < self.batch_size:
                raise ConfigError("batch_size", self.batch_size, f"must be at most {seen}, the images of one reader")
            number, skip = number + 1, 0

    def _batch(self, pictures: list[tuple[torch.Tensor, int]], *words: int) -> Fetched:
        x, y = self.picture.batch(pictures)
        if self.mixing:
            x, y = self.mixing(x, y, *words)
        return Fetched((x, y), take_dropped())
