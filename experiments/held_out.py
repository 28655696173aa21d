"""Data with their test part in two halves: one to choose settings by (validation), one to report on (test)."""

from typing import Any

from lowrank_pretrain.data.images.arrays import ArrayImages
from lowrank_pretrain.data.images.fashion_mnist import MEAN, STD, FashionMNIST, read_files, read_sample
from lowrank_pretrain.data.text.tokens import TokenData, TokenSet


class Images(FashionMNIST):
    """Fashion-MNIST; half of its test images each for validation and test (of the embedded sample 1,000)."""

    def setup(self, stage: str | None = None) -> None:
        """As the base class, then cut."""
        super().setup(stage)
        images, labels = (read_sample() if self.root == "sample" else read_files(self.root))["test"]
        common: dict[str, Any] = {"num_classes": self.num_classes, "img_size": self.img_size, "in_chans": self.in_chans}
        halves = [ArrayImages(images[k::2], labels[k::2], **common, mean=MEAN, std=STD, seed=self.seed) for k in range(2)]
        self.val_set, self.test_set = halves


class Text(TokenData):
    """Embedded King James text; the validation file's first half for validation, the second for test."""

    def setup(self, stage: str | None = None) -> None:
        """As the base class, then cut."""
        super().setup(stage)
        tokens, path = self.val_set.tokens, self.val_set.path
        middle = len(tokens) // 2
        halves = (tokens[:middle], tokens[middle:])
        self.val_set, self.test_set = (TokenSet(half, self.seq_len, self.vocab_size, path) for half in halves)
