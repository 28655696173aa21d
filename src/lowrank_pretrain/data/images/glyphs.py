"""Load glyphs: printable characters, drawn from the font files of a machine; a test font was never seen in training.

``python -m lowrank_pretrain.data.images.draw_glyphs`` makes the files. 94 classes, gray, 64×64 pixels.
"""

import csv
from pathlib import Path

import numpy as np

from lowrank_pretrain.core.errors import ConfigError
from lowrank_pretrain.data import SAMPLES
from lowrank_pretrain.data.checksums import check_sums
from lowrank_pretrain.data.images.medmnist import UNREADABLE
from lowrank_pretrain.data.images.module import ImageModule
from lowrank_pretrain.data.loaders.base import evaluation_recipe

CHARACTERS = "".join(chr(code) for code in range(33, 127))  # all of printable ASCII but the space
MEAN, STD = (0.066,), (0.23,)  # of white ink on black
SPLITS = ("train", "val", "test")


class Glyphs(ImageModule):
    """Load glyphs into memory. Train, validation and test are other families of fonts.

    Args:
        root: the folder that ``draw_glyphs`` has made; ``sample`` (embedded): 12 fonts for trials and tests.
        num_workers: loading processes; 0 is the fastest for images in memory.
        num_classes: 94, or None for the same; larger only leaves outputs of the model unused.

    All other arguments are described at :class:`~lowrank_pretrain.data.images.module.ImageModule`.

    Raises:
        ConfigError: a wrong value, or (from ``setup``) no files at ``root``.

    Example:
        >>> data = Glyphs("sample", batch_size=8)
        >>> data.setup()
        >>> len(data.class_names), data.train_set.img_size
        (94, 64)
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        img_size: int = 64,
        in_chans: int = 1,
        num_classes: int | None = len(CHARACTERS),
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mix_prob: float = 1.0,
        switch_prob: float = 0.5,
        smoothing: float = 0.0,
        seed: int | None = None,
    ) -> None:
        num_classes = len(CHARACTERS) if num_classes is None else num_classes
        mixing = mixup, cutmix, mix_prob, switch_prob, smoothing
        super().__init__(batch_size, num_workers, num_classes, img_size, in_chans, mixing, seed)
        self.root = root
        self.dataset_name = "glyphs (sample of 12 fonts)" if root == "sample" else "glyphs"
        self.class_names = list(CHARACTERS) if num_classes == len(CHARACTERS) else None
        self.preprocessing = evaluation_recipe(img_size, in_chans, MEAN, STD)

    def setup(self, stage: str | None = None) -> None:
        """Read the files, once."""
        if self.train_set is not None:
            return
        split = read_glyphs(self.root)
        self.train_set = self.in_memory(split["train"], MEAN, STD, train=True)
        self.val_set, self.test_set = (self.in_memory(split[name], MEAN, STD) for name in ("val", "test"))


def read_glyphs(root: str | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return images and labels by split: uint8 (N, 64, 64) and (N,).

    Raises:
        ConfigError: the files are not there, cannot be read, or are not those that ``SHA256SUMS`` names.
    """
    if root is not None and not isinstance(root, (str, Path)):
        raise ConfigError("root", root, "must be a folder, or sample")
    path = SAMPLES / "glyphs.npz" if root == "sample" else Path(root or "glyphs") / "glyphs.npz"
    try:
        with np.load(path) as file:
            arrays = {f"{split}_{what}": file[f"{split}_{what}"] for split in SPLITS for what in ("images", "labels")}
    except FileNotFoundError as error:
        make = "python -m lowrank_pretrain.data.images.draw_glyphs --out glyphs"
        allowed = f"must hold glyphs.npz: {make} (data.root=sample needs none)"
        raise ConfigError("root", str(root), allowed) from error
    except UNREADABLE + (KeyError,) as error:
        raise ConfigError("root", str(root), f"glyphs.npz cannot be read ({error}): make it again") from error
    check_sums(path.parent, arrays, "root")
    return {split: (arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in SPLITS}


def read_fonts(root: str | Path) -> list[dict[str, str]]:
    """Return the rows of ``fonts.csv``: file, family, split and licence of each font."""
    with (Path(root) / "fonts.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
