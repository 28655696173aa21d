"""Define the base of the image data modules: the arguments and checks that all of them share."""

from collections.abc import Sequence

import numpy as np

from lowrank_pretrain.data.images.arrays import ArrayImages, check_shape
from lowrank_pretrain.data.images.mixing import Mixing, MixingOptions
from lowrank_pretrain.data.loaders.base import PretrainData


class ImageModule(PretrainData):
    """Hold what all data modules of images share: shape, classes and mixing.

    These arguments mean the same in every subclass.

    Args:
        batch_size: images per batch and process.
        num_workers: loading processes.
        num_classes: K, at least the number of classes in the set; None: as many as the set has.
        img_size: side of the images that are handed out, pixels.
        in_chans: 1 or 3; gray images are repeated, and coloured ones turned to gray.
        mixing: ``mixup``, ``cutmix``, ``mix_prob``, ``switch_prob`` and ``smoothing``, see
            :class:`~lowrank_pretrain.data.images.mixing.Mixing`. Training only.
        seed: of order, augmentation and mixing; None: the run's.

    Raises:
        ConfigError: a wrong value.
    """

    def __init__(
        self,
        batch_size: int,
        num_workers: int,
        num_classes: int | None,
        img_size: int,
        in_chans: int,
        mixing: MixingOptions,
        seed: int | None,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        check_shape(img_size, in_chans, 1 if num_classes is None else num_classes)
        self.num_classes, self.img_size, self.in_chans = num_classes, img_size, in_chans
        self._mixing_options = mixing
        self.mixing(num_classes or 1).check_batch_size(batch_size)

    def mixing(self, num_classes: int) -> Mixing:
        """Return the object that mixes a batch's images and labels."""
        return Mixing(num_classes, *self._mixing_options, self.seed)

    def in_memory(
        self, part: tuple[np.ndarray, np.ndarray], mean: Sequence[float], std: Sequence[float], train: bool = False,
        flip: bool = False,
    ) -> ArrayImages:  # fmt: skip
        """Return a part of a set whose number of classes is known, held in memory; training images are mixed.

        Args:
            part: images and labels, as :class:`~lowrank_pretrain.data.images.arrays.ArrayImages` takes them.
            mean: of the pixel values, one per stored channel.
            std: their standard deviation.
            train: whether the part is trained on.
            flip: mirror half of the images at random.
        """
        classes = self.num_classes or 1
        mixing = self.mixing(classes) if train else None
        return ArrayImages(*part, classes, self.img_size, self.in_chans, mean, std, flip, mixing, self.seed)
