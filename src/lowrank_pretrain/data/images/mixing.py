"""Mixup, CutMix and label smoothing: timm's, drawn from the batch's own seed.

mixup: https://arxiv.org/abs/1710.09412, CutMix: https://arxiv.org/abs/1905.04899.
Shapes: B batch, C channels, H×W pixels, K classes.
"""

import math
from typing import Any

import torch

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data.loaders.rng import borrowed, reseed


class Mixing:
    """Mixes the images of a batch and their labels.

    Args:
        num_classes: K.
        mixup: alpha of mixup's Beta distribution; 0 is off.
        cutmix: alpha of CutMix's Beta distribution; 0 is off.
        mix_prob: share of the batches that are mixed.
        switch_prob: where both are on, the share that gets CutMix.
        smoothing: share of the label spread evenly over all classes, in [0, 1).
        seed: the run's seed; None: the one given to ``seed_everything``.

    Raises:
        ConfigError: an alpha below 0, or a share outside [0, 1].
    """

    def __init__(
        self,
        num_classes: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        switch_prob: float = 0.5,
        smoothing: float = 0.0,
        seed: int | None = None,
    ) -> None:
        for key, value in (("mixup", mixup), ("cutmix", cutmix)):
            if not _number(value) or value < 0:
                raise ConfigError(key, value, "must be 0 (off) or a positive alpha")
        for key, value in (("mix_prob", mix_prob), ("switch_prob", switch_prob)):
            if not _number(value) or not 0 <= value <= 1:
                raise ConfigError(key, value, "must be a share in [0, 1]")
        if not _number(smoothing) or not 0 <= smoothing < 1:
            raise ConfigError("smoothing", smoothing, "must be a share in [0, 1)")
        self.num_classes, self.smoothing, self.seed = num_classes, smoothing, seed
        self.mixes = mixup > 0 or cutmix > 0
        self.active = self.mixes or smoothing > 0
        self._mixup = None
        if self.mixes:
            from timm.data import Mixup

            self._mixup = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=mix_prob,
                switch_prob=switch_prob,
                label_smoothing=smoothing,
                num_classes=num_classes,
            )

    def check(self, batch_size: int) -> None:
        """Raise a ConfigError if batches of this size cannot be mixed: sample i is mixed with sample B−1−i."""
        if self.mixes and batch_size % 2:
            raise ConfigError("batch_size", batch_size, "must be even for mixup and cutmix")

    def __call__(self, x: torch.Tensor, y: torch.Tensor, *words: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix in place.

        Args:
            x: images (B, C, H, W), float.
            y: labels (B,), int64.
            words: what the draws are for, e.g. epoch and first index.

        Returns:
            Images (B, C, H, W) and labels: (B, K) float when anything is on, else ``y`` as it came.
        """
        if not self.active:
            return x, y
        if self._mixup is None:
            from timm.data.mixup import mixup_target

            return x, mixup_target(y, self.num_classes, 1.0, self.smoothing)
        with borrowed():
            reseed("mixing", *words, seed=self.seed)
            return self._mixup(x, y)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
