"""Load Fashion-MNIST: the embedded sample of 14,000 images, or all 70,000 if they are installed.

https://github.com/zalandoresearch/fashion-mnist. 28×28 gray images of 10 kinds of clothes.
"""

from pathlib import Path

import numpy as np

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data import SAMPLES
from lowrank_pretrain.data.images.idx import read_idx
from lowrank_pretrain.data.images.module import ImageModule
from lowrank_pretrain.data.loaders.base import evaluation_recipe

MEAN, STD = (0.2860,), (0.3530,)  # of the 60,000 training images
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
NAMES = "T-shirt/top|Trouser|Pullover|Dress|Coat|Sandal|Shirt|Sneaker|Bag|Ankle boot".split("|")
STEMS = {"train": "train", "test": "t10k"}


class FashionMNIST(ImageModule):
    """Load Fashion-MNIST into memory. Validation and test are both its 10,000 (sample: 2,000) test images.

    Args:
        root: ``sample`` (embedded), a folder with the four idx files, torchvision's root (``root/FashionMNIST/raw``), or
            None: the folder of Debian's package ``dataset-fashion-mnist``.
        num_workers: loading processes; 0 is the fastest at 28 pixels.
        num_classes: 10, or None for the same; larger only leaves outputs of the model unused.
        flip: mirror half of the training images at random.

    All other arguments are described at :class:`~lowrank_pretrain.data.images.module.ImageModule`.

    Raises:
        ConfigError: a wrong value, or (from ``setup``) no files at ``root``.
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        img_size: int = 28,
        in_chans: int = 1,
        num_classes: int | None = 10,
        flip: bool = True,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        switch_prob: float = 0.5,
        smoothing: float = 0.0,
        seed: int | None = None,
    ) -> None:
        num_classes = len(NAMES) if num_classes is None else num_classes
        mixing = mixup, cutmix, mix_prob, switch_prob, smoothing
        super().__init__(batch_size, num_workers, num_classes, img_size, in_chans, mixing, seed)
        self.root, self.flip = root, flip
        self.dataset_name = "Fashion-MNIST (sample of 14,000 images)" if root == "sample" else "Fashion-MNIST"
        self.class_names = list(NAMES) if num_classes == len(NAMES) else None
        self.preprocessing = evaluation_recipe(img_size, in_chans, MEAN, STD)

    def setup(self, stage: str | None = None) -> None:
        """Read the files, once."""
        if self.train_set is not None:
            return
        split = read_sample() if self.root == "sample" else read_files(self.root)
        self.train_set = self.in_memory(split["train"], MEAN, STD, train=True, flip=self.flip)
        self.val_set = self.test_set = self.in_memory(split["test"], MEAN, STD)


def read_sample() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the embedded images and labels by split: uint8 (N, 28, 28) and (N,)."""
    with np.load(SAMPLES / "fashion_mnist.npz") as file:
        return {split: (file[f"{split}_images"], file[f"{split}_labels"]) for split in STEMS}


def read_files(root: str | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return all images and labels by split, from the idx files under ``root`` (None: Debian's package).

    Raises:
        ConfigError: the files are not there, or cannot be read.
    """
    folders = [DEBIAN] if root is None else [Path(root), Path(root) / "FashionMNIST" / "raw"]
    for folder in folders:
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for split, stem in STEMS.items():
            images, labels = _find(folder, stem, "images-idx3"), _find(folder, stem, "labels-idx1")
            if images is not None and labels is not None:
                found[split] = read_idx(images), read_idx(labels)
        if len(found) == len(STEMS):
            return found
    allowed = (
        "must hold Fashion-MNIST's four idx files; `apt-get install dataset-fashion-mnist` brings them, or "
        "`torchvision.datasets.FashionMNIST(root, download=True)` (data=fashion_mnist_sample needs neither)"
    )
    raise ConfigError("root", str(root or DEBIAN), allowed)


def _find(folder: Path, stem: str, kind: str) -> Path | None:
    names = (f"{stem}-{kind}-ubyte.gz", f"{stem}-{kind}-ubyte")
    return next((folder / name for name in names if (folder / name).is_file()), None)
