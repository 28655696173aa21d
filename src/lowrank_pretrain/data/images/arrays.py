"""Hold images in memory: a batch is one tensor index, so that a small model on one core does not wait for its data.

Shapes: N images, B batch, C stored channels (1 or 3), H×W pixels, K classes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from lowrank_pretrain.core.agreement import generator
from lowrank_pretrain.core.checks import is_integer, whole
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data.images.mixing import Mixing
from lowrank_pretrain.data.loaders.batch import Fetched

MOST_CLASSES, MOST_PIXELS = 1 << 24, 1 << 15  # a typing error must not ask for all memory
GRAY = (0.299, 0.587, 0.114)  # weights of red, green and blue in gray, ITU-R 601


class ArrayImages:
    """Hold a set of images as one uint8 array.

    Args:
        images: uint8, (N, H, W) or (N, H, W, 3); not copied.
        labels: integers, (N,) or (N, 1), in [0, num_classes).
        num_classes: K.
        img_size: side of the square images that are handed out, pixels; resized bilinearly if needed.
        in_chans: 1 or 3; gray images are repeated, and coloured ones turned to gray.
        mean: of the pixel values in [0, 1], one per stored channel.
        std: their standard deviation, one per stored channel.
        flip: mirror half of the images, chosen anew every epoch.
        mixing: mixup, CutMix or label smoothing, for training only.
        seed: the run's seed; None: the one given to ``seed_everything``.

    Raises:
        ConfigError: shapes or labels that do not fit the arguments.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        num_classes: int,
        img_size: int,
        in_chans: int,
        mean: Sequence[float],
        std: Sequence[float],
        flip: bool = False,
        mixing: Mixing | None = None,
        seed: int | None = None,
    ) -> None:
        check_shape(img_size, in_chans, num_classes)
        images = images[..., None] if images.ndim == 3 else images
        fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == len(mean) in (1, 3)
        integral = labels.dtype.kind in "iu" or (labels.dtype.kind == "f" and bool((labels == np.floor(labels)).all()))
        if not fits or not integral or len(images) != labels.size or not len(images):
            allowed = "must be N images uint8 (N, H, W) or (N, H, W, 3) and N labels, integers, at least 1"
            raise ConfigError("root", f"{images.dtype}{images.shape} and {labels.dtype}{labels.shape}", allowed)
        labels = labels.reshape(-1).astype(np.int64)
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ConfigError("num_classes", num_classes, f"must be above every label, found {labels.min()} to {labels.max()}")
        self.images = torch.from_numpy(images)  # (N, H, W, C)
        self.labels = torch.from_numpy(labels)  # (N,)
        self.img_size, self.in_chans, self.flip, self.mixing, self.seed = img_size, in_chans, flip, mixing, seed
        # (x/255 − mean)/std as one multiply-add
        self.scale = torch.tensor([1 / (255 * s) for s in std]).view(-1, 1, 1)
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)
        self._flips: tuple[int, torch.Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, epoch: int, indices: list[int]) -> Fetched:
        """Return images (B, in_chans, img_size, img_size) float32 and labels: (B,) int64, or (B, K) float when mixing."""
        index = torch.tensor(indices)
        pixels = self.images[index].permute(0, 3, 1, 2).contiguous()  # (B, C, H, W)
        x = torch.addcmul(self.shift, pixels, self.scale)
        y = self.labels[index]
        if x.shape[-2:] != (self.img_size, self.img_size):
            x = functional.interpolate(x, (self.img_size, self.img_size), mode="bilinear", antialias=True)
        if self.flip:
            x = torch.where(self._flipped(epoch)[index].view(-1, 1, 1, 1), x.flip(-1), x)
        x = with_channels(x, self.in_chans)
        if self.mixing:
            x, y = self.mixing(x, y, epoch, indices[0])
        return Fetched((x, y), [])

    def _flipped(self, epoch: int) -> torch.Tensor:
        # drawn for the whole set at once, so that it depends on neither batch size nor workers; (N,) bool
        if self._flips is None or self._flips[0] != epoch:
            draws = torch.rand(len(self), generator=generator("flip", epoch, seed=self.seed))
            self._flips = epoch, draws < 0.5
        return self._flips[1]


def check_shape(img_size: int, in_chans: int, num_classes: int) -> None:
    """Refuse a number of classes, a size or a number of channels that no images can have.

    Raises:
        ConfigError: one of them is wrong.
    """
    classes = f"must be the number of classes in the set, at most {MOST_CLASSES:,}"
    whole("num_classes", num_classes, 1, most=MOST_CLASSES, allowed=classes)
    whole("img_size", img_size, 1, most=MOST_PIXELS, allowed=f"must be a positive number of pixels, at most {MOST_PIXELS:,}")
    if not is_integer(in_chans) or in_chans not in (1, 3):
        raise ConfigError("in_chans", in_chans, "must be 1 or 3")


def with_channels(x: torch.Tensor, in_chans: int) -> torch.Tensor:
    """Return images with the channels asked for, (B, C, H, W) -> (B, in_chans, H, W).

    Gray is repeated; colours become gray with the weights of the eye.
    """
    if x.shape[1] == in_chans:
        return x
    if in_chans == 3:
        return x.repeat(1, 3, 1, 1)
    return (x * torch.tensor(GRAY).view(-1, 1, 1)).sum(1, keepdim=True)
