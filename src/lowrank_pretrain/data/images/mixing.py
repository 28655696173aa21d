"""Mix the images of a batch by timm's mixup, CutMix and label smoothing, drawn from a seed of the batch's own.

mixup: https://arxiv.org/abs/1710.09412, CutMix: https://arxiv.org/abs/1905.04899.
Shapes: B batch, C channels, H×W pixels, K classes.
"""

import torch

from lowrank_pretrain.core.checks import number
from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.core.extras import optional_import
from lowrank_pretrain.data.loaders.rng import borrowed, reseed

MixingOptions = tuple[float, float, float, float, float]  # mixup, cutmix, mix_prob, switch_prob, smoothing


class Mixing:
    """Mix the images of a batch and their labels.

    Args:
        num_classes: K.
        mixup: alpha of mixup's Beta distribution; 0 is off.
        cutmix: alpha of CutMix's Beta distribution; 0 is off.
        mix_prob: share of the batches that are mixed.
        switch_prob: if both are on, the share that gets CutMix.
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
            number(key, value, least=0, allowed="must be 0 (off) or a positive alpha")
        for key, value in (("mix_prob", mix_prob), ("switch_prob", switch_prob)):
            number(key, value, least=0, most=1, allowed="must be a share in [0, 1]")
        number("smoothing", smoothing, least=0, below=1, allowed="must be a share in [0, 1)")
        self.num_classes, self.smoothing, self.seed = num_classes, smoothing, seed
        self.mixes = mixup > 0 or cutmix > 0
        self.active = self.mixes or smoothing > 0
        self._mixup = None
        if self.mixes:
            with optional_import("mixup", mixup):
                from timm.data import Mixup

            self._mixup = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=mix_prob,
                switch_prob=switch_prob,
                label_smoothing=smoothing,
                num_classes=num_classes,
            )

    def check_batch_size(self, batch_size: int) -> None:
        """Refuse an odd batch size where images are mixed: image i is mixed with image B−1−i.

        Raises:
            ConfigError: batches of this size cannot be mixed.
        """
        if self.mixes and batch_size % 2:
            raise ConfigError("batch_size", batch_size, "must be even for mixup and cutmix")

    def __call__(self, x: torch.Tensor, y: torch.Tensor, *words: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix in place.

        Args:
            x: images (B, C, H, W), float.
            y: labels (B,), int64.
            words: what the draws are for, e.g. epoch and first index.

        Returns:
            Images (B, C, H, W) and labels: (B, K) float where anything is on, else ``y`` unchanged.
        """
        if not self.active:
            return x, y
        if self._mixup is None:
            from timm.data.mixup import mixup_target

            return x, mixup_target(y, self.num_classes, 1.0, self.smoothing)
        with borrowed():
            reseed("mixing", *words, seed=self.seed)
            return self._mixup(x, y)
